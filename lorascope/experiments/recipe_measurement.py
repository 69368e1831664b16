"""Measured cost of a run of a recipe: seconds of a step and peak memory, with random weights of the real shape."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from lorascope.experiments import step_memory, step_time
from lorascope.experiments.grid import Job
from lorascope.inputs import models
from lorascope.inputs.tasks import Task
from lorascope.methods.method import Method, config
from lorascope.training.loop import usable_device
from lorascope.training.settings import Settings

STEPS = 20
"""Steps of a measurement, of which the first two are left out."""
_WARMUP, _MEMORY_STEPS, _OTHER_ROWS = 2, 2, 8
# A measurement sets its own length, and evaluates nothing.
_NOT_MEASURED = {
    *("steps", "epochs", "warmup", "eval_every", "eval_size", "test_size", "test_state"),
    *("metric", "model_options"),
}
_SAME_COST = ("lr", "head_lr", "alpha")


class Cost(NamedTuple):
    """Cost of a step: median seconds, and peak of allocated bytes with rows of the full length, NaN if unknown."""

    seconds: float
    peak_bytes: float


class CostMeter:
    """Meter of the cost of jobs, which measures jobs with equal models, lengths and methods once.

    Parameters
    ----------
    device : str, optional
        Device; by default an accelerator if available, else the CPU, on which one thread computes.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = usable_device(device)
        self._costs: dict[str, Cost] = {}

    @property
    def count(self) -> int:
        """Number of measurements."""
        return len(self._costs)

    def measure(self, model_name: str, job: Job, stand_in: Task, method: Method) -> Cost:
        """Measure the cost of a step of a job.

        Parameters
        ----------
        model_name : str
            Name of its model, of which only configuration and tokenizer are read.
        job : Job
            The job. If its data are loaded, random rows of train are timed, otherwise rows of the full length.
        stand_in : Task
            Generated rows, whose texts are repeated up to the full length.
        method : Method
            Its method with a schedule of a few steps.

        Raises
        ------
        RuntimeError, ValueError
            The model does not fit into memory, or cannot be trained with these settings.
        """
        settings = {
            setting.name: job.settings[setting.name] for setting in fields(Settings) if setting.name in job.settings
        }
        options = settings.get("model_options")
        settings = {name: value for name, value in settings.items() if name not in _NOT_MEASURED}
        long_rows = _lengthen(stand_in, settings.get("max_length", Settings.max_length))
        rows = long_rows
        if isinstance(job.data, Task):
            rows = _sample(job.data, STEPS * settings.get("batch_size", Settings.batch_size))
        values = {name: value for name, value in config(method).items() if name not in _SAME_COST}
        key = json.dumps([model_name, options, values, settings, rows.hash], sort_keys=True, default=str)
        if key not in self._costs:
            # Models of one shape differ by their head only, which has the labels of the task.
            model = partial(models.outline, model_name, rows, options, "cpu")
            long_model = partial(models.outline, model_name, long_rows, options, "cpu")
            with tempfile.TemporaryDirectory(prefix="lorascope-measure-") as root:
                where: Mapping[str, Any] = {"root": root, "device": self.device, **settings}
                timed = step_time.measure(model, rows, method, steps=STEPS, **where)
                metered = step_memory.measure(long_model, long_rows, method, steps=_MEMORY_STEPS, **where)
                self._costs[key] = Cost(_median_seconds(timed.table), _last_peak(metered.table))
        return self._costs[key]


def _median_seconds(table: pd.DataFrame) -> float:
    """Return the median over steps of the seconds of all their parts."""
    seconds = table[table["quantity"].isin(["forward_seconds", "backward_seconds", "rest_seconds"])]
    return float(seconds.groupby("step")["value"].sum().iloc[_WARMUP:].median())


def _last_peak(table: pd.DataFrame) -> float:
    return float(table.loc[table["quantity"] == "peak_bytes", "value"].iloc[-1])


def _sample(task: Task, count: int) -> Task:
    """Return a task with random rows of train, and a few of the other splits."""
    train = task.table[task.table["split"] == "train"]
    evaluated = task.table[task.table["split"] != "train"].groupby("split").head(_OTHER_ROWS)
    return replace(task, table=pd.concat([train.sample(min(count, len(train)), random_state=0), evaluated]))


def _lengthen(task: Task, length: int) -> Task:
    """Return a task whose texts have at least as many tokens as a length."""
    table = task.table.copy()
    for column in ("text", "prompt"):
        if column in table:
            # A word has one token or more.
            table[column] = (table[column] + " ") * length
    if "context" in table:
        # The context has many words already, and more windows would be tokenized only.
        words = min(len(context.split()) for context in table["context"])
        table["context"] = (table["context"] + " ") * (length // words + 1)
    return replace(task, table=table)
