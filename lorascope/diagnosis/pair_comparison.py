"""Comparison of several adapters or runs, as ``lorascope inspect`` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorascope.analysis import adapter_similarity
from lorascope.diagnosis.inspection import Inspection, rows
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import utf8_text


@dataclass(frozen=True)
class Comparison:
    """Inspections, and the tables of their pairwise comparison by ``adapter_similarity``.

    Labels are the names of the folders, or their paths if names are equal.
    """

    inspections: tuple[Inspection, ...]
    matrix: pd.DataFrame
    modules: pd.DataFrame

    @property
    def labels(self) -> list[str]:
        """Labels of the inspections."""
        return list(dict.fromkeys(self.matrix["one"]))

    def table(self) -> pd.DataFrame:
        """Return the matrix, with ``module`` empty, followed by one row per module and pair."""
        modules = self.modules.drop(columns="inner")
        columns = ["one", "other", "module", *self.matrix.columns[2:]]
        return pd.concat([self.matrix.assign(module=""), modules])[columns]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the JSON form of each inspection, with its comparison with each of the others, also per module."""
        entries = []
        for label, item in zip(self.labels, self.inspections, strict=True):
            pairs = self.matrix[(self.matrix["one"] == label) & (self.matrix["other"] != label)].drop(columns="one")
            modules = self.modules[self.modules["one"] == label].drop(columns=["one", "inner"])
            compared = {"label": label, "compared": rows(pairs), "compared_modules": rows(modules)}
            entries.append(item.to_json() | compared)
        return entries


def compare(inspections: Sequence[Inspection], spectra: bool = False) -> Comparison:
    """Compare inspections pairwise.

    Raises
    ------
    ValueError
        They are not on one model, or one occurs twice.
    """
    labels = distinct_labels(inspections)
    runs = {label: item.run for label, item in zip(labels, inspections, strict=True)}
    shared = adapter_similarity.modules(runs, spectra)
    return Comparison(tuple(inspections), adapter_similarity.matrix(runs, shared), shared)


def distinct_labels(inspections: Sequence[Inspection]) -> list[str]:
    """Return the names of the inspected folders, or their paths where names are equal.

    Raises
    ------
    ValueError
        One occurs twice.
    """
    names = [item.name for item in inspections]
    labels = [item.name if names.count(item.name) == 1 else utf8_text(item.path) for item in inspections]
    duplicate = next((label for label in labels if labels.count(label) > 1), None)
    if duplicate is not None:
        raise ValueError(f"duplicate adapter or run {duplicate!r}")
    return labels
