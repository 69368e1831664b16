"""Figures of the training itself: loss and metric over the steps, under guidance, and by rate."""

from __future__ import annotations

import math

import pandas as pd

from lorascope.analysis import optimizer_moments
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Chart, Drawable, Line, Panels, Point, set_side_by_side, wrap
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import INTERVAL, Cohort, Runs, axis_label, ends, gather, lines

_CURVES = ("loss", "eval_loss", "eval_metric")


@figure(
    needs=("loss",),
    history=True,
    reads="Lower is better for losses, higher for accuracy. Where the bands of two recipes overlap, these seeds do not "
    "rank them. A training loss that falls while the validation loss rises is overfitting.",
    misleads="The training loss is averaged in windows, so it lags and hides spikes. Validation chose the best state, "
    "so its best point flatters; the test split alone tells how good a run is.",
)
def training_curves(runs: Runs, control: Runs | None = None, windows: int = 25) -> Drawable:
    """Training loss, and validation loss and metric where they were recorded, one line a recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    windows : int
        The training loss of every run is averaged in at most this many windows of equal length.
    """
    cohort = gather("training_curves", runs, control)
    cohort.require("loss", history=True)
    table = cohort.label(cohort.table)
    rows = {quantity: table[table["quantity"] == quantity] for quantity in _CURVES}
    width = math.ceil(rows["loss"]["step"].max() / windows)
    panels = [
        _curve_chart(cohort, quantity, _average_windows(found, width) if quantity == "loss" else found, _windows(width))
        for quantity, found in rows.items()
        if len(found)
    ]
    return wrap(panels, len(panels))


@figure(
    needs=("loss", "direction_cosine"),
    history=True,
    reads="On the left the training loss with guidance and without. On the right the cosine that guidance goes by: it "
    "divides the step by one minus this, so that at 0.5 a step is twice as long. Set guidance against a higher rate "
    "without it: what such a rate does too is no merit of the angle.",
    misleads="What the paper shows of guidance, and its formula, could not be checked. At the first step direction and "
    "average are parallel whatever the text, and the floor alone says how long that step is. Averages of independent "
    "directions have a cosine of 0.44 with the last of them at a first beta of 0.9, so a step is longer even where the "
    "angle says nothing.",
)
def guidance(runs: Runs, control: Runs | None = None, windows: int = 25) -> Panels:
    """Training loss with and without cosine guidance, beside the cosine of direction and first moment (Adapprox).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Of Adapprox, some with ``cosine=True``.
    windows : int
        The training loss of every run is averaged in at most this many windows of equal length.
    """
    cohort = gather("guidance", runs, control)
    cohort.require("loss", "direction_cosine", history=True)
    table = cohort.label(cohort.table)
    losses = table[table["quantity"] == "loss"]
    width = math.ceil(losses["step"].max() / windows)
    angles = table[(table["quantity"] == "direction_cosine") & table["layer"].notna()]
    angles = angles.groupby(["run", "recipe", "kind", "step"], observed=True)["value"].mean().reset_index()
    told = f"{_windows(width)} Mean cosine of the factored matrices in the blocks."
    return set_side_by_side(
        _curve_chart(cohort, "loss", _average_windows(losses, width), told),
        _curve_chart(cohort, "direction_cosine", angles, told),
    )


@figure(
    needs=("eval_loss", "test_loss"),
    reads="On the left each method's validation loss by rate: a minimum inside says that its best rate was tried. On "
    "the right the test loss at that rate, chosen on validation. Where intervals overlap, the seeds do not rank them.",
    misleads="A best rate at an end of the range need not be the best there is. Few steps favour what moves fast at "
    "first, and a rate means something else to each method, so that equal numbers are no fair comparison.",
)
def learning_rates(runs: Runs, control: Runs | None = None) -> Panels:
    """Validation loss by learning rate, beside the test loss of each method at its own best.

    Parameters
    ----------
    runs, control : mapping label -> runs
        What stands before " at " in a label is the method.
    """
    cohort = gather("learning_rates", runs, control)
    cohort.require("eval_loss", "test_loss")
    cells = optimizer_moments.rates(
        cohort.label(cohort.table), {run.id: run.meta["settings"]["lr"] for run in cohort.runs}
    )
    chosen = optimizer_moments.best(cells["eval_loss"])
    methods = list(dict.fromkeys(cells["eval_loss"]["method"]))
    tested = cells["test_loss"].merge(chosen, on=["method", "lr"])
    tested = tested.assign(at=tested["method"])
    rates = "; ".join(f"{row.method} {row.lr:.3g}" for row in chosen.itertuples())
    told = f"Best rates by mean validation loss at the end: {rates}."
    caption = cohort.caption(told, *cohort.dense_moment_note(), interval=f"bars: {INTERVAL}")
    panels = []
    for x, table, title, quantity in (
        ("lr", cells["eval_loss"], "by rate", "eval_loss"),
        ("at", tested, "each at its best", "test_loss"),
    ):
        low, high = ends(table)
        line = [Line("lr", "value", "method")] if x == "lr" else []
        panels.append(
            Chart(
                table,
                [*line, Point(x, "value", "method", low=low, high=high)],
                title=title,
                x=Axis(label="learning rate", log=True) if x == "lr" else Axis(order=methods),
                y=Axis(label=axis_label(quantity)),
                caption=caption,
                colors=methods,
                meta=cohort.meta,
            )
        )
    return set_side_by_side(*panels)


def _curve_chart(cohort: Cohort, quantity: str, rows: pd.DataFrame, averaged: str) -> Chart:
    cells = band(rows, ["recipe", "kind", "step"]).assign(quantity=quantity)
    return Chart(
        cells,
        lines(cells, "step", points=quantity != "loss"),
        x=Axis(label="step"),
        y=Axis(label=axis_label(quantity)),
        caption=cohort.caption(averaged, *cohort.dense_moment_note()),
        colors=cohort.labels,
        meta=cohort.meta,
    )


def _windows(width: int) -> str:
    return f"Training loss averaged in windows of {width} steps." if width > 1 else "Training loss of each step."


def _average_windows(rows: pd.DataFrame, width: int) -> pd.DataFrame:
    """Mean of every run in windows of ``width`` steps, placed at a window's last step."""
    last = rows.groupby("run", observed=True)["step"].transform("max")
    end = (-(-rows["step"] // width) * width).clip(upper=last)
    windows = rows.assign(step=end).groupby(["run", "recipe", "kind", "step"], observed=True, sort=False)
    return windows["value"].mean().reset_index()
