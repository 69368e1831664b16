"""How long a step takes by part, of runs whose steps were measured."""

from __future__ import annotations

import pandas as pd

PARTS = {"forward_seconds": "forward", "backward_seconds": "backward", "rest_seconds": "rest"}
WARM = 2  # steps that make the optimizer's state and fill the caches


def medians(table: pd.DataFrame) -> pd.DataFrame:
    """Median of every run and part over the steps after ``WARM``.

    Returns
    -------
    DataFrame
        ``run, part, value``, in seconds.

    Raises
    ------
    ValueError
        A run has no such steps.
    """
    rows = _warm_steps(table)
    found = rows.groupby(["run", "quantity"], observed=True)["value"].median().reset_index()
    return found.assign(part=found["quantity"].map(PARTS))[["run", "part", "value"]]


def spread(table: pd.DataFrame) -> float:
    """Half the width of the middle half of the steps, over their median, of the run where that is widest."""
    whole = _warm_steps(table).groupby(["run", "step"])["value"].sum().groupby("run")
    return float(((whole.quantile(0.75) - whole.quantile(0.25)) / 2 / whole.median()).max())


def _warm_steps(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[table["quantity"].isin(PARTS)].astype({"run": "str", "quantity": "str"})
    late = rows[rows["step"] > WARM]
    if short := sorted({*rows["run"]} - {*late["run"]}):
        raise ValueError(f"run {short[0]} was measured for {WARM} steps or fewer, which are slower: give it more steps")
    return late
