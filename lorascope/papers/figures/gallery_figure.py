"""Definition of a figure of the gallery, what its runs are, and parts that several figures share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Chart, Drawable
from lorascope.charts.marks import Axis, Line, Point
from lorascope.papers.judging import registration
from lorascope.plots.builders import add_printed, ends, metric_bars
from lorascope.plots.run_groups import INTERVAL, gather
from lorascope.runs.manifest import Manifest, Parameters, Test
from lorascope.runs.result import Result
from lorascope.schema import records
from lorascope.schema.records import Record
from lorascope.updates import Update

_SCORES = {
    "eval_loss": "validation_loss",
    "eval_metric": "validation_metric",
    "test_loss": "test_loss",
    "test_metric": "test_metric",
}


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
    quantities : tuple of str
        Quantities that the figure shows of the records of its runs. The evidence keeps them, so that the figure can be
        drawn again without the runs.
    arrays : tuple of str
        Arrays that the figure shows of the snapshots of its runs, such as "selected"; kept likewise.
    shows_factors : bool
        Whether the figure shows factors, which are too large to keep: it is only drawn where its runs are.
    seeds : int
        Number of seeds, from the first judged one on. Default 5, the first look of most claims; with two, intervals are
        seven times as wide. Figures of scores show all seeds that all arms have, at least two.
    table : str
        Name of a kept table that all runs of a figure of scores must have. Default none.
    tuning : bool
        Whether a figure of scores shows the tuning runs as well.
    """

    name: str
    alt: str
    arms: Mapping[str, str]
    draw: Callable[[Mapping[str, Sequence[Any]]], Drawable]
    quantities: tuple[str, ...] = ()
    arrays: tuple[str, ...] = ()
    shows_factors: bool = False
    seeds: int = 5
    table: str = ""
    tuning: bool = False

    @property
    def shows_scores(self) -> bool:
        """Whether scores and kept tables are enough, so that the runs of ``draw`` are ``KeptScores``."""
        return not (self.quantities or self.arrays or self.shows_factors)


Sections = Mapping[str, Sequence[GalleryFigure]]
"""Figures by heading."""


def figures_by_name(sections: Sections) -> dict[str, tuple[str, GalleryFigure]]:
    """Return heading and definition of every gallery figure by its name."""
    by_name = {}
    for heading, figures in sections.items():
        for figure in figures:
            by_name[figure.name] = heading, figure
    return by_name


class KeptScores(Result):
    """Row of a kept run and its kept tables, as a result that gallery figures draw, without factors and records.

    Parameters
    ----------
    row : mapping
        Its row in ``runs.csv``.
    tables : mapping name -> DataFrame
        Its kept tables.
    """

    kind = "kept run"
    has_history = False

    def __init__(self, row: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> None:
        method = json.loads(row["method"])
        # A perplexity has no chance level.
        name = "perplexity" if math.isnan(row["validation_chance"]) else "accuracy"
        super().__init__(
            None,
            Manifest(
                id=row["run"],
                label=row["arm"],
                method=method,
                recipe=method,
                model=row["model"],
                task=row["task"],
                seed=int(row["seed"]),
                status="done",
                settings={**json.loads(row["settings"]), "lr": row["rate"]},
                parameters=Parameters(int(row["trained_parameters"])),
                modules=[],
                test=Test(name, row["test_metric"], row["test_loss"]),
            ),
        )
        self._scores = {quantity: float(row[column]) for quantity, column in _SCORES.items()}
        self.tables = tables

    @cached_property
    def table(self) -> pd.DataFrame:
        step, scores = self.meta.settings["steps"], self._scores.items()
        rows = [(step, Record(quantity, score)) for quantity, score in scores if not math.isnan(score)]
        return records.frame(self.id, rows, self.modules)

    def factors(self, step: int | None = None, state: str = "last") -> dict[str, Any]:
        return {}

    def updates(self, step: int | None = None, state: str = "last") -> dict[str, Update]:
        return {}

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        return set()

    def ranks(self, state: str = "last") -> dict[str, int]:
        return {}


def own_labels(*labels: str) -> dict[str, str]:
    """Return the arms of a gallery figure in which they have the labels of the registration."""
    return dict(zip(labels, labels, strict=True))


def accuracy_bars(runs: Mapping[str, Sequence[Any]], title: str, start: float) -> Chart:
    """Return a gallery figure's test accuracy of arms as bars, from ``start``; arms may have different tasks."""
    return metric_bars(gather("accuracy", runs), start, "", (), title)


def accuracy_by_rank(runs: Mapping[str, Sequence[Any]], ranks: Mapping[str, int], title: str, rates: str) -> Chart:
    """Return a gallery figure's test accuracy of arms by rank, one line per method.

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
    # Labels are such as "LoRA, rank 8".
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


def printed(**columns: str) -> pd.DataFrame:
    """Return rows of ``data/published/reported.csv``, whose scores are in points, in the units of a gallery figure.

    Parameters
    ----------
    **columns
        Values of the columns ``paper, table, model, data, metric, method`` by which rows are chosen.

    Returns
    -------
    DataFrame
        ``method, data, size, parameters, value, source``; ``size`` is the number or percentage of parameters as
        printed, ``parameters`` is NaN where the paper prints no number, and ``source`` is an entry of a legend.
    """
    table = pd.read_csv(registration.FILE.parent / "published" / "reported.csv")
    for name, value in columns.items():
        table = table[table[name] == value]
    size = table["parameters"]
    # Papers print a number of parameters, as 0.3M, or a percentage of all of them, which gives no number.
    millions = pd.to_numeric(size.where(size.str.endswith("M").eq(True)).str.removesuffix("M"))
    numbers = table[["method", "data"]].assign(size=size, parameters=1e6 * millions, value=table["value"] / 100)
    return numbers.assign(source="printed: " + numbers["method"]).reset_index(drop=True)


def add_printed_sizes(chart: Chart, numbers: pd.DataFrame, reference: str) -> Chart:
    """Add numbers that a paper prints to a gallery figure of accuracy by parameters; labels are above or below.

    The printed numbers widen the axis, so that labels on the right would be on the lines.
    """
    data = chart.data
    side = np.sign(data["above"] - data["value"])  # 1 for a label above its point, -1 for one below
    # With one seed there is no interval, so the label is at the value.
    tips = data["high"].where(side > 0, data["low"]).fillna(data["value"])
    span = max(tips.max(), numbers["value"].max()) - tips.min()
    labeled = replace(chart, data=data.assign(right=data["parameters"], above=tips + side * 0.03 * span))
    return add_printed(labeled, numbers, "parameters", reference)


def training_loss(runs: Mapping[str, Sequence[Any]]) -> Drawable:
    """Return a gallery figure's training loss by step, without validation scores, which arms have only at the end."""
    return plots.training_curves(runs).charts()[0]
