"""Track record of predictions: what cutting to a rank cost, and what retraining at this rank cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorascope.analysis.paired_rows import LEVEL
from lorascope.analysis.seed_intervals import MINIMUM_SEEDS
from lorascope.array_types import Float
from lorascope.files.printable import printable

RECORD = "prices.jsonl"
"""Name of the track record, next to the folders of the runs."""
FEWEST_CELLS = 39
"""Cells of a track record whose smallest and largest residual bound a further one with probability 38 / 40."""
_KEY = ("run", "to", "seeds")  # of an entry, so that a repeated measurement is not a second one
_CELL = ("task", "base", "rank", "to")
_PRICES = ("cut", "retrained")


class ConformalBounds(NamedTuple):
    """Bounds of the residual of a further cell, and the probability that they contain it if cells are exchangeable."""

    low: float
    high: float
    coverage: float


def conformal_bounds(residuals: Float[np.ndarray, "cell"]) -> ConformalBounds:
    """Return the split conformal bounds with an error of 2.5% in each direction.

    Of n exchangeable residuals, a further one is below the i-th smallest with probability i / (n + 1), so that both
    ends need 39 of them. The prediction is the cut price itself, without a fitted factor: fitting one to the same cells
    would end their exchangeability.

    Raises
    ------
    ValueError
        There are fewer than 39 residuals.
    """
    n = len(residuals)
    if n < FEWEST_CELLS:
        raise ValueError(f"residuals must be of at least {FEWEST_CELLS} cells, got {n}")
    # The end is the residual of this place from either side.
    rank = math.floor((n + 1) * LEVEL)
    ordered = np.sort(residuals)
    return ConformalBounds(float(ordered[rank - 1]), float(ordered[n - rank]), 1 - 2 * rank / (n + 1))


def read_residuals(record: Path, excluded_run: str) -> Float[np.ndarray, "cell"]:
    """Return retrained minus cut price of every cell of a track record: task, base and both ranks.

    Entries of the run itself and those of fewer than 3 seeds are excluded. Later runs of a cell replace earlier ones.

    Raises
    ------
    ValueError
        A line is not an entry.
    """
    cells = {}
    for entry in _read_entries(record):
        # The price of a run must not be predicted from itself.
        if entry["run"] != excluded_run and entry["seeds"] >= MINIMUM_SEEDS:
            cells[tuple(map(entry.get, _CELL))] = entry["retrained"] - entry["cut"]
    return np.array(list(cells.values()))


def add_entries(record: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Append entries to a track record, but those that are in it already."""
    stored = {tuple(map(entry.get, _KEY)) for entry in _read_entries(record)}
    lines = [json.dumps(entry) + "\n" for entry in entries if tuple(map(entry.get, _KEY)) not in stored]
    if lines:
        with record.open("a", encoding="utf-8") as file:
            file.writelines(lines)


def _read_entries(record: Path) -> list[dict[str, Any]]:
    if not record.exists():
        return []
    entries = []
    for number, line in enumerate(record.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            is_entry = isinstance(entry, dict) and entry.keys() >= {*_KEY, *_CELL, *_PRICES}
        except ValueError:
            is_entry = False
        if not is_entry:
            raise ValueError(f"cannot read {printable(record)}: line {number} is not an entry of a track record")
        entries.append(entry)
    return entries
