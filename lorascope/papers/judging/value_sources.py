"""Sources of the values of a claim: the runs that they come from, and the draws of a simulated control."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.statistics import Method, OfRun, Simulated, Statistic

COLUMNS = ("draws", "draw_error", "runs_statistic", "runs_control")


def add_sources(
    values: pd.DataFrame, pair: tuple[Statistic, Statistic], evidence: Evidence, method: Method
) -> pd.DataFrame:
    """Add the sources of every value of a claim.

    Parameters
    ----------
    values : DataFrame
        One row per ``seed``.
    pair : (Statistic, Statistic)
        Statistic and control.
    evidence : Evidence
        Runs of one machine.
    method : str
        Method of the interval. Pseudo-values of the jackknife come from the runs of all seeds.

    Returns
    -------
    DataFrame
        With ``COLUMNS``. ``runs_statistic`` and ``runs_control`` are run ids, separated by spaces, by seed and then by
        arm. ``draws`` and ``draw_error`` are the number of draws and the standard error of a control that is simulated,
        else missing.
    """
    seeds = [int(seed) for seed in values["seed"]]
    of_rows = [seeds] * len(seeds) if method == "jackknife" else [[seed] for seed in seeds]
    statistic, control = pair
    draws = [_draws(control, evidence, seed) for seed in seeds]
    return values.assign(
        draws=pd.array([number for number, _ in draws], dtype="Int64"),
        draw_error=pd.array([error for _, error in draws], dtype="Float64"),
        runs_statistic=[_runs(statistic, evidence, each) for each in of_rows],
        runs_control=[_runs(control, evidence, each) for each in of_rows],
    )


def _runs(statistic: Statistic, evidence: Evidence, seeds: Sequence[int]) -> str:
    runs = [evidence.run(arm, seed) for seed in seeds for arm in sorted(statistic.arms())]
    return " ".join(dict.fromkeys(runs))  # a baseline is the same for all seeds


def _draws(control: Statistic, evidence: Evidence, seed: int) -> tuple[int | None, float | None]:
    """Return the number of draws and the standard error of a control; None if it is not simulated."""
    if isinstance(control, Simulated):
        return control.draws, control.error
    if isinstance(control, OfRun):
        table = evidence.table(control.table, control.arm, seed)
        if {"draws", "error"} <= set(table):
            # The control selects its row of the table, so it also selects that row's draws and error.
            number, error = (control.value(table.assign(value=table[name])) for name in ("draws", "error"))
            return int(number), error
    return None, None
