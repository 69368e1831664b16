"""Time per training step, split into forward pass, backward pass and rest, for runs with measured steps."""

from __future__ import annotations

import pandas as pd

COMPONENTS = {"forward_seconds": "forward", "backward_seconds": "backward", "rest_seconds": "rest"}
WARM = 2  # warm-up steps, which are slower because they create the optimizer state and fill the caches


def median_times(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the median step time of every run and part over the steps after the first ``WARM``.

    Returns
    -------
    DataFrame
        ``run, part, value`` (seconds).

    Raises
    ------
    ValueError
        A run has no measured step after the first ``WARM``.
    """
    rows = _warm_steps(table)
    medians = rows.groupby(["run", "quantity"], observed=True)["value"].median().reset_index()
    return medians.assign(part=medians["quantity"].map(COMPONENTS))[["run", "part", "value"]]


def relative_spread(table: pd.DataFrame) -> float:
    """Compute half the interquartile range of the step times over their median, and return the largest of all runs."""
    step_times = _warm_steps(table).groupby(["run", "step"])["value"].sum().groupby("run")
    return float(((step_times.quantile(0.75) - step_times.quantile(0.25)) / 2 / step_times.median()).max())


def _warm_steps(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[table["quantity"].isin(COMPONENTS)].astype({"run": "str", "quantity": "str"})
    late = rows[rows["step"] > WARM]
    if short := sorted({*rows["run"]} - {*late["run"]}):
        raise ValueError(f"run {short[0]} must have more than {WARM} measured steps: the first {WARM} are warm-up")
    return late
