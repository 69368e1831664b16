"""Order in which loss, gradients and weights of a training stopped being finite, which separates causes.

A step computes its loss and gradients at the weights of the step before, and then changes the weights.
"""

from __future__ import annotations

import numpy as np

from lorascope.files.lazy_pandas import pandas as pd


def describe_nonfinite(finite: int | None, broken: int, loss: int | None, gradients: int | None) -> str:
    """Name the first value of a training that was not finite.

    Parameters
    ----------
    finite : int or None
        Last step at which the weights are known to be finite; None if they never were.
    broken : int
        First step after which the weights are known not to be finite.
    loss, gradients : int or None
        First step after ``finite``, and not after ``broken``, at which it was not finite; None if it always was.
    """
    if finite is None:
        return "the weights were not finite before training"
    if gradients is not None and (loss is None or gradients < loss):
        return f"the loss of step {gradients} was finite, its gradients were not"
    if loss is None:
        return f"the loss of step {broken} was finite, the weights after it were not"
    if loss == finite + 1:
        return f"the weights were finite before step {loss}, its loss was not"
    return f"the weights were finite at step {finite} and the loss until step {loss - 1}"


def first_nonfinite(table: pd.DataFrame) -> str:
    """Return the phrase for the records of a run, or "" if all its updates are finite or too little was recorded."""
    updates = _steps(table, "update_norm")
    if updates.all():
        return ""
    broken = int(min(updates.index[~updates]))
    finite = max(updates.index[updates & (updates.index < broken)], default=None)
    losses, gradients = (_steps(table, quantity) for quantity in ("loss", "grad_norm"))
    if finite is not None and broken not in losses:
        return ""
    first = []
    for steps in (losses, gradients):
        bad = steps.index[~steps & (steps.index > (finite or 0)) & (steps.index <= broken)]
        first.append(min(bad, default=None))
    return describe_nonfinite(finite, broken, *first)


def _steps(table: pd.DataFrame, quantity: str) -> pd.Series:
    """Return whether all recorded values of a quantity are finite, by step in ascending order."""
    rows = table[table["quantity"] == quantity]
    return pd.Series(np.isfinite(rows["value"]), rows.index).groupby(rows["step"].astype("int64")).all()
