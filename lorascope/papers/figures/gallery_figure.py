"""Definition of a figure of the gallery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Chart, Drawable
from lorascope.charts.marks import Axis, Line, Point
from lorascope.plots.builders import add_printed, ends, metric_bars
from lorascope.plots.run_groups import INTERVAL, gather


@dataclass(frozen=True, kw_only=True)
class GalleryFigure:
    """A figure of the gallery, which is drawn from runs of the evidence.

    Parameters
    ----------
    name : str
        Name of its file, without ".png".
    alt : str
        What it shows, in one line.
    arms : mapping label -> label
        Label of the runs in the figure -> label of their registered arm.
    draw : callable
        ``draw(runs)`` returns the chart, given the runs of each label in the order of their seeds.
    seeds : int or None
        Number of seeds, from the first judged one on. None shows all seeds that all arms have, at least two. Default
        5, the first look of most claims; with two, intervals are seven times as wide.
    scores_only : bool
        Whether scores and kept tables are enough. If so, ``runs`` are ``KeptScores``.
    table : str
        Name of a kept table that all runs must have, which requires ``scores_only``. Default none.
    tuning : bool
        Whether the tuning runs are shown as well, which requires ``scores_only``.
    quantities : tuple of str
        Quantities that the figure shows of the records of its runs. The evidence keeps them, so that the figure can be
        drawn again without the runs.
    arrays : tuple of str
        Arrays that the figure shows of the snapshots of its runs, such as "selected"; kept likewise. A figure without
        quantities and arrays shows factors, which are too large to keep: it is only drawn where its runs are.
    """

    name: str
    alt: str
    arms: Mapping[str, str]
    draw: Callable[[Mapping[str, Sequence[Any]]], Drawable]
    seeds: int | None = 5
    scores_only: bool = False
    table: str = ""
    tuning: bool = False
    quantities: tuple[str, ...] = ()
    arrays: tuple[str, ...] = ()

    @property
    def shows_factors(self) -> bool:
        """Whether the figure needs the factors of its runs, which the evidence does not keep."""
        return not (self.scores_only or self.quantities or self.arrays)


def own_labels(*labels: str) -> dict[str, str]:
    """Return the arms of a figure in which they have the labels of the registration."""
    return {label: label for label in labels}


def accuracy_bars(runs: Mapping[str, Sequence[Any]], title: str, start: float) -> Chart:
    """Return the test accuracy of arms as bars, on an axis from ``start``; they may have different tasks."""
    return metric_bars(gather("accuracy", runs), start, "", (), title)


def accuracy_by_rank(runs: Mapping[str, Sequence[Any]], ranks: Mapping[str, int], title: str, rates: str) -> Chart:
    """Return the test accuracy of arms by rank, one line per method.

    Parameters
    ----------
    runs : mapping label -> sequence of run
        Runs of each arm; labels start with the name of the method, up to a comma.
    ranks : mapping label -> rank
        Rank of each arm, averaged over its modules.
    title : str
        Title of the chart.
    rates : str
        Which learning rates the arms have, as a sentence of the caption.
    """
    cohort = gather("accuracy", runs)
    cells = band(cohort.scores(), ["recipe"])
    cells = cells.assign(rank=cells["recipe"].map(ranks), method=cells["recipe"].str.partition(",")[0])
    return Chart(
        cells.sort_values("rank"),
        [Line("rank", "value", "method"), Point("rank", "value", "method", **ends(cells))],
        title=title,
        x=Axis(label="rank per module", log=True, ticks={rank: str(rank) for rank in sorted(set(ranks.values()))}),
        y=Axis(label=cohort.metric),
        caption=cohort.caption(rates, interval=f"bars: {INTERVAL}"),
        colors=dict.fromkeys(cells["method"]),
    )


def add_printed_sizes(chart: Chart, printed: pd.DataFrame, place: str) -> Chart:
    """Add numbers that a paper prints to accuracy by trained parameters; labels are then above or below their points.

    The printed numbers widen the axis, so that labels on the right would be on the lines.
    """
    data = chart.data
    side = np.sign(data["above"] - data["value"])
    tips = data["high"].where(side > 0, data["low"]).fillna(data["value"])
    span = max(tips.max(), printed["value"].max()) - tips.min()
    labeled = replace(chart, data=data.assign(right=data["parameters"], above=tips + side * 0.03 * span))
    return add_printed(labeled, printed, "parameters", place)


def training_loss(runs: Mapping[str, Sequence[Any]]) -> Drawable:
    """Return the training loss over the steps, without validation scores, which arms have only after the last step."""
    return plots.training_curves(runs).charts()[0]
