"""Figures of the training itself: loss and metric over the steps."""

from __future__ import annotations

import math

import pandas as pd

from lorascope.analysis.stats import band
from lorascope.chart import Axis, Chart, Drawable, beside
from lorascope.plots.catalogue import figure
from lorascope.plots.cohort import Cohort, Runs, axis_label, gather, lines

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
    averaged = f"Training loss averaged in windows of {width} steps." if width > 1 else "Training loss of each step."
    panels = [
        _curve(cohort, quantity, _average(found, width) if quantity == "loss" else found, averaged)
        for quantity, found in rows.items()
        if len(found)
    ]
    return panels[0] if len(panels) == 1 else beside(*panels)


def _curve(cohort: Cohort, quantity: str, rows: pd.DataFrame, averaged: str) -> Chart:
    cells = band(rows, ["recipe", "kind", "step"]).assign(quantity=quantity)
    return Chart(
        cells,
        lines(cells, "step", points=quantity != "loss"),
        x=Axis(label="step"),
        y=Axis(label=axis_label(quantity)),
        caption=cohort.caption(averaged),
        colors=cohort.labels,
        meta=cohort.meta,
    )


def _average(rows: pd.DataFrame, width: int) -> pd.DataFrame:
    """Mean of every run in windows of ``width`` steps, placed at a window's last step."""
    last = rows.groupby("run", observed=True)["step"].transform("max")
    end = (-(-rows["step"] // width) * width).clip(upper=last)
    windows = rows.assign(step=end).groupby(["run", "recipe", "kind", "step"], observed=True, sort=False)
    return windows["value"].mean().reset_index()
