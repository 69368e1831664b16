"""Learning rates: final losses of optimizers by their learning rate, and the best rate of each."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lorascope.analysis.norms import last_recorded
from lorascope.analysis.seed_intervals import seed_cells


def average_losses_by_rate(table: pd.DataFrame, rate: Mapping[str, float]) -> dict[str, pd.DataFrame]:
    """Average the final validation and test losses of optimizers over seeds, by method and learning rate.

    Parameters
    ----------
    table : DataFrame
        Records with ``records.COLUMNS`` and ``recipe``; the part of a recipe before the last " at " is the method.
    rate : mapping run id -> learning rate
        Learning rate of each run.

    Returns
    -------
    dict quantity -> DataFrame
        For ``eval_loss`` and ``test_loss``: ``method, lr``, and the mean and interval of ``seed_intervals.seed_cells``.
    """
    names = table["recipe"].astype("str")
    methods = names.str.rpartition(" at ")[0]  # recipes of this study are named "METHOD at LEARNING RATE"
    table = table.assign(method=methods.where(methods != "", names))
    losses = {}
    for quantity in ("eval_loss", "test_loss"):
        rows = last_recorded(table[table["quantity"] == quantity])
        cells = seed_cells(rows.assign(lr=rows["run"].astype("str").map(rate)), ["method", "lr"])
        by_rate = [
            method_cells.sort_values("lr", kind="stable") for _, method_cells in cells.groupby("method", sort=False)
        ]
        losses[quantity] = pd.concat(by_rate, ignore_index=True)
    return losses


def best_rates(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the learning rate with the lowest mean loss of each optimizer: ``method, lr``."""
    return cells.loc[cells.groupby("method", sort=False)["value"].idxmin(), ["method", "lr"]].reset_index(drop=True)
