"""Figures of the agreement between scores, from tables of ``analysis.score_agreement.correlate``."""

from __future__ import annotations

import pandas as pd

from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Heat, Point, Rule
from lorascope.plots.builders import pair_heat
from lorascope.plots.registry import table_figure


@table_figure
def agreement(cells: pd.DataFrame, level: str) -> Chart:
    """Plot the rank correlation of every pair of scores, averaged over runs.

    Parameters
    ----------
    cells : DataFrame
        Table with columns ``run, first, second, value, low, high``.
    level : str
        Scored objects, such as "components", "modules" or "neurons".
    """
    return pair_heat(
        _mean_cells(cells),
        Heat("second", "first", "value", "Spearman correlation", ".2f", scale="diverging", limits=(-1, 1)),
        list(dict.fromkeys(cells["first"])),
        title=f"Agreement of scores over {level}",
        caption=f"Spearman rank correlation over {level}. {_describe_runs(cells)}; intervals are in the data.",
        meta={"figure": "agreement", "runs": list(dict.fromkeys(cells["run"]))},
    )


@table_figure
def against_truth(cells: pd.DataFrame, truth: str, level: str) -> Chart:
    """Plot the rank correlation of every score with the true one, averaged over runs, with its interval.

    Parameters
    ----------
    cells : DataFrame
        Table as for :func:`agreement`.
    truth : str
        Name of the score that is the truth.
    level : str
        Scored objects, as for :func:`agreement`.
    """
    found = cells[(cells["second"] == truth) & (cells["first"] != truth)]
    means = _mean_cells(found).sort_values("value", ascending=False)
    return Chart(
        means,
        [Rule(x=0), Point("value", "first", low="low", high="high")],
        title=f"Agreement with the {truth} ({level})",
        x=Axis(label=f"Spearman correlation with the {truth}", limits=(-1, 1)),
        y=Axis(order=means["first"]),
        caption=f"Rank correlation over {level}. {_describe_runs(cells)}; bars: 95% bootstrap interval over modules.",
        meta={"figure": "against_truth", "runs": list(dict.fromkeys(cells["run"]))},
    )


def _mean_cells(cells: pd.DataFrame) -> pd.DataFrame:
    return cells.groupby(["first", "second"], sort=False)[["value", "low", "high"]].mean().reset_index()


def _describe_runs(cells: pd.DataFrame) -> str:
    number = cells["run"].nunique()
    return "One run" if number == 1 else f"Mean of values and of bounds over {number} seeds"
