"""Several adapters or runs compared: what ``lorascope inspect`` tells of more than one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lorascope.analysis import adapter_similarity
from lorascope.diagnosis.inspection import Inspection, rows


@dataclass(frozen=True)
class Comparison:
    """Inspections and what lies between them.

    Parameters
    ----------
    inspections : tuple of Inspection
    matrix : DataFrame
        ``adapter_similarity.matrix``; labels are the names of the folders, or their paths where names coincide.
    modules : DataFrame
        ``adapter_similarity.modules``.
    """

    inspections: tuple[Inspection, ...]
    matrix: pd.DataFrame
    modules: pd.DataFrame

    @property
    def labels(self) -> list[str]:
        """One for each inspection."""
        return list(dict.fromkeys(self.matrix["one"]))

    def table(self) -> pd.DataFrame:
        """The matrix, with ``module`` empty, and below it a row for every module of every two."""
        each = self.modules.drop(columns="inner")
        return pd.concat([self.matrix.assign(module=""), each])[["one", "other", "module", *self.matrix.columns[2:]]]

    def to_json(self) -> list[dict[str, Any]]:
        """The JSON form of each inspection, with ``compared``: it beside each of the others, by module, too."""
        told = []
        for label, item in zip(self.labels, self.inspections, strict=True):
            mine = self.matrix[(self.matrix["one"] == label) & (self.matrix["other"] != label)]
            told.append(item.to_json() | {"label": label, "compared": rows(mine.drop(columns="one"))})
            shared = self.modules[self.modules["one"] == label].drop(columns=["one", "inner"])
            told[-1]["compared_modules"] = rows(shared)
        return told


def compare(inspections: Sequence[Inspection], spectra: bool = False) -> Comparison:
    """Set inspections beside each other.

    Raises
    ------
    ValueError
        They are not on one model, or one was given twice.
    """
    names = [item.name for item in inspections]
    labels = [item.name if names.count(item.name) == 1 else str(item.run.path) for item in inspections]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} was given twice: give each once")
    runs = {label: item.run for label, item in zip(labels, inspections, strict=True)}
    shared = adapter_similarity.modules(runs, spectra)
    return Comparison(tuple(inspections), adapter_similarity.matrix(runs, shared), shared)
