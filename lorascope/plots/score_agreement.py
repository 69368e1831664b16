"""Figures of the agreement between scores, from tables of ``analysis.score_agreement.correlate``."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis.seed_intervals import MINIMUM_SEEDS, seed_cells
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Heat, Rule
from lorascope.plots.builders import dots, pair_heat
from lorascope.plots.figure_registry import document_result
from lorascope.plots.run_groups import INTERVAL, PAIR


@document_result
def agreement(cells: pd.DataFrame, level: str) -> Chart:
    """Plot the agreement of scores: rank correlation of every pair, averaged over runs.

    Two scores with a correlation near 1 order the objects in the same way, so that one of them suffices. Caveat: scores
    may agree and all be wrong; compare them with a measured effect.

    Parameters
    ----------
    cells : DataFrame
        Table with columns ``run, first, second, value, low, high``.
    level : str
        Scored objects, such as "components", "modules" or "neurons".

    Examples
    --------
    ``correlations`` compare scores of the modules of ``ls.example("adapter")``.

    >>> ls.plots.agreement(correlations, "modules")
    """
    sample, interval = _describe_runs(cells)
    return pair_heat(
        _mean_cells(cells),
        Heat("second", "first", "value", "Spearman correlation", ".2f", scale="diverging", limits=(-1, 1)),
        list(dict.fromkeys(cells["first"])),
        title=f"Agreement of scores over {level}",
        caption=f"Spearman rank correlation over {level}. {sample}; {interval} in the data.",
        meta={"figure": "agreement", "runs": list(dict.fromkeys(cells["run"]))},
    )


@document_result
def against_truth(cells: pd.DataFrame, truth: str, level: str) -> Chart:
    """Plot the agreement of every score with the true one: rank correlation, averaged over runs, with its interval.

    A score whose interval is above 0 orders the objects better than at random. Caveat: a correlation over all objects
    says little about the few that matter most.

    Parameters
    ----------
    cells : DataFrame
        Table as for :func:`agreement`.
    truth : str
        Name of the score that is the truth.
    level : str
        Scored objects, as for :func:`agreement`.

    Examples
    --------
    ``correlations`` compare scores of the modules of ``ls.example("adapter")``.

    >>> ls.plots.against_truth(correlations, "effect of removal", "modules")
    """
    sample, interval = _describe_runs(cells)
    with_truth = cells[(cells["second"] == truth) & (cells["first"] != truth)]
    means = _mean_cells(with_truth).sort_values("value", ascending=False)
    return Chart(
        means,
        [Rule(x=0), *dots(means, "value", "first")],  # no agreement
        title=f"Agreement with the {truth} ({level})",
        x=Axis(label=f"Spearman correlation with the {truth}", limits=(-1, 1)),
        y=Axis(order=means["first"]),
        caption=f"Rank correlation over {level}. {sample}; {interval}.",
        meta={"figure": "against_truth", "runs": list(dict.fromkeys(cells["run"]))},
    )


def _mean_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of one run with their intervals over modules, or the mean of several with one over seeds."""
    return cells if cells["run"].nunique() == 1 else seed_cells(cells, ["first", "second"])


def _describe_runs(cells: pd.DataFrame) -> tuple[str, str]:
    """Return what is shown, and how its spread is."""
    number = cells["run"].nunique()
    if number == 1:
        return "One run", "bars: 95% bootstrap interval over modules"
    return f"Mean of {number} seeds", f"bars: {INTERVAL}" if number >= MINIMUM_SEEDS else PAIR
