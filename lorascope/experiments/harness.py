"""Benchmarks of lm-evaluation-harness on the adapted model of a run, stored in the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.extras import requirement
from lorascope.files.typed_json import read_json
from lorascope.files.whole_files import write_json
from lorascope.inputs import models
from lorascope.methods.field_checks import is_integer
from lorascope.runs.run import Run
from lorascope.schema.suggestions import unknown_name
from lorascope.training.loop import usable_device
from lorascope.training.run_spec import reload_model

_STATES = ("last", "best")
_PACKAGES = ("lm_eval", "lorascope", "torch", "transformers")


def harness(
    run: Run,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    model: str | Path | None = None,
    state: str = "last",
    batch_size: int = 8,
    device: str | None = None,
    include_path: str | Path | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Evaluate the adapted model of a run on tasks of lm-evaluation-harness, and store the result in its folder.

    The same call returns the stored result. Scores of the same harness are comparable with each other only, so
    evaluate the base model by it as well.

    Parameters
    ----------
    run : Run
        Finished run of ``train`` on a causal language model.
    tasks : sequence of str
        Tasks or groups of tasks of lm-eval, such as ``["mmlu"]``.
    num_fewshot : int, optional
        Number of examples before each prompt; by default that of each task.
    limit : int, optional
        Maximum number of rows per task; all by default.
    model : str or path, optional
        Base model of the run, if it is not in the same place as in the training.
    state : {"last", "best"}
        Saved parameters to evaluate.
    batch_size : int
        Rows per forward pass.
    device : str, optional
        Device; by default an accelerator if available, else the CPU.
    include_path : path, optional
        Folder with YAML files of further tasks.
    overwrite : bool
        Evaluate again and replace a stored result.

    Returns
    -------
    DataFrame
        ``task, metric, filter, value, stderr, num_fewshot, rows``: one row per task, or group of tasks, and metric.
        lm-eval computes the standard errors; they are NaN without one. ``attrs["versions"]`` has the versions of
        packages and tasks.

    Raises
    ------
    ModuleNotFoundError
        lm-eval is not installed.
    ValueError
        An argument is invalid, a task is unknown, or the run has no language model head.

    Examples
    --------
    >>> ls.harness(run, ["mmlu"], num_fewshot=0)  # doctest: +SKIP
    """
    if isinstance(tasks, str) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"tasks must be a list of names of lm-eval, such as ['mmlu'], got {tasks!r}")
    for name, number, minimum in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if number is not None and not (is_integer(number) and number >= minimum):
            raise ValueError(f"{name} must be an integer >= {minimum}, got {number!r}")
    if state not in _STATES:
        raise ValueError(f"state must be one of {', '.join(map(repr, _STATES))}, got {state!r}")
    call = {"tasks": list(tasks), "num_fewshot": num_fewshot, "limit": limit, "state": state}
    digest = hashlib.sha256(json.dumps(call).encode()).hexdigest()[:12]
    file = run._folder / "harness" / f"{digest}.json"
    if file.exists() and not overwrite:
        return _table(read_json(file, dict[str, Any]))
    if run.meta.labels is not None:
        raise ValueError(f"cannot evaluate run {run.id} with lm-eval: its head is a classifier, not a language model")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if (required := requirement(error)) is None:
            raise
        raise ModuleNotFoundError(f"ls.harness {required}", name=error.name) from None
    # Names that are wrong are reported before a model is loaded.
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            raise ValueError(unknown_name("task of lm-eval", task, manager.all_tasks))
    base: Any = reload_model(run, run.meta.model if model is None else model)
    run.restore(base, state)
    adapted = HFLM(pretrained=base.to(usable_device(device)), tokenizer=models.processor(base), batch_size=batch_size)
    results: Any = lm_eval.simple_evaluate(
        adapted, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
    )
    versions = {package: metadata.version(package) for package in _PACKAGES}
    content = {"call": call, "versions": versions | {"tasks": results["versions"]}, "scores": _scores(results)}
    file.parent.mkdir(exist_ok=True)
    write_json(file, content)
    return _table(content)


def _scores(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per task and metric of a result with keys such as ``"acc,none"`` and ``"acc_stderr,none"``."""
    rows = []
    for task, values in results["results"].items():
        counts = results["n-samples"].get(task, {})
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            row = {"task": task, "metric": metric, "filter": filter_name, "value": float(value)}
            # A text stands for a metric without a standard error.
            row["stderr"] = float(stderr) if isinstance(stderr, float) else None
            rows.append(row | {"num_fewshot": results["n-shot"].get(task), "rows": counts.get("effective")})
    return rows


def _table(content: Mapping[str, Any]) -> pd.DataFrame:
    columns = ["task", "metric", "filter", "value", "stderr", "num_fewshot", "rows"]
    table = pd.DataFrame(content["scores"], columns=columns)
    table["stderr"] = table["stderr"].astype("float64")
    table.attrs["versions"] = content["versions"]
    return table
