"""Evenly spaced steps, layers and other items, for figures that have space for a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def select_steps(cells: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return the rows at up to ``most`` evenly spaced steps that all runs recorded, including the first and last.

    Raises
    ------
    ValueError
        The runs have no recorded step in common.
    """
    # A frame of a figure shows all runs at one step.
    steps = [set(rows["step"].dropna()) for _, rows in cells.groupby("run", observed=True)]
    common = sorted(set.intersection(*steps))
    if not common:
        raise ValueError(
            "cannot compare the runs: they have no recorded step in common. Train them with the same steps and every="
        )
    return cells[cells["step"].isin(evenly_spaced(common, most))]


def evenly_spaced(items: Sequence[Any], most: int) -> list[Any]:
    """Return up to ``most`` evenly spaced items, including the first and last."""
    indices = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[index] for index in np.unique(indices)]
