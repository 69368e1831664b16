"""Scores and kept tables of a run, in the form that figures take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pandas as pd

from lorascope.runs.manifest import Manifest, Parameters, Test
from lorascope.runs.result import Result
from lorascope.schema import records
from lorascope.schema.records import Record
from lorascope.updates import Update

_SCORES = {
    "eval_loss": "validation_loss",
    "eval_metric": "validation_metric",
    "test_loss": "test_loss",
    "test_metric": "test_metric",
}


class KeptScores(Result):
    """Row of a run in the evidence and its kept tables, as a result without factors and records of its training.

    Parameters
    ----------
    row : mapping
        Its row in ``runs.csv``.
    tables : mapping name -> DataFrame
        Its kept tables.
    """

    kind = "kept run"
    has_history = False

    def __init__(self, row: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> None:
        method = json.loads(row["method"])
        name = "perplexity" if math.isnan(row["validation_chance"]) else "accuracy"
        super().__init__(
            None,
            Manifest(
                id=row["run"],
                label=row["arm"],
                method=method,
                recipe=method,
                model=row["model"],
                task=row["task"],
                seed=int(row["seed"]),
                status="done",
                settings={**json.loads(row["settings"]), "lr": row["rate"]},
                parameters=Parameters(int(row["trained_parameters"])),
                modules=[],
                test=Test(name, row["test_metric"], row["test_loss"]),
            ),
        )
        self._scores = {quantity: float(row[column]) for quantity, column in _SCORES.items()}
        self.tables = tables

    @cached_property
    def table(self) -> pd.DataFrame:
        known = {quantity: value for quantity, value in self._scores.items() if not math.isnan(value)}
        rows = [(self.meta.settings["steps"], Record(quantity, value)) for quantity, value in known.items()]
        return records.frame(self.id, rows, self.modules)

    def factors(self, step: int | None = None, state: str = "last") -> dict[str, Any]:
        return {}

    def updates(self, step: int | None = None, state: str = "last") -> dict[str, Update]:
        return {}

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        return set()

    def ranks(self, state: str = "last") -> dict[str, int]:
        return {}
