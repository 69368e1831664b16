"""Figures of training: loss and metric over the steps, cosine guidance, and loss by learning rate."""

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
    topic="schedules",
    needs=("loss",),
    history=True,
    reads="Lower losses and higher accuracies are better; where the bands of two recipes overlap, these seeds do not "
    "order them. A falling training loss with a growing validation loss means overfitting.",
    misleads="The training loss is averaged over windows of steps, so it lags and hides spikes: use more windows. The "
    "best state is chosen on validation, so its validation score is optimistic: judge runs on the test split.",
)
def training_curves(runs: Runs, control: Runs | None = None, windows: int = 25) -> Drawable:
    """Plot training loss and, if recorded, validation loss and metric over the steps, one line per recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    windows : int
        Maximum number of windows of equal length over which the training loss is averaged.

    Examples
    --------
    >>> ls.plots.training_curves({"full fine-tuning": full, "LoRA": lora})
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
    topic="optimizers",
    needs=("loss", "direction_cosine"),
    history=True,
    reads="Left: training loss with and without guidance; right: the cosine c, where guidance divides the step by 1 − "
    "c. Guidance helps only if it also beats a higher learning rate without it.",
    misleads="The paper's formula and results could not be verified, and the first step depends only on the floor, "
    "because its cosine is 1. Independent directions already have cosine 0.44 with their average at β₁ = 0.9, so steps "
    "grow even without a signal.",
)
def guidance(runs: Runs, control: Runs | None = None, windows: int = 25) -> Panels:
    """Plot training loss with and without cosine guidance, and the cosine of direction and first moment (Adapprox).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of Adapprox, some of them with ``cosine=True``.
    windows : int
        Maximum number of windows of equal length over which the training loss is averaged.

    Examples
    --------
    >>> ls.plots.guidance({"Adapprox": adapprox, "with guidance": guided})
    """
    cohort = gather("guidance", runs, control)
    cohort.require("loss", "direction_cosine", history=True)
    table = cohort.label(cohort.table)
    losses = table[table["quantity"] == "loss"]
    width = math.ceil(losses["step"].max() / windows)
    angles = table[(table["quantity"] == "direction_cosine") & table["layer"].notna()]
    angles = angles.groupby(["run", "recipe", "kind", "step"], observed=True)["value"].mean().reset_index()
    caption = f"{_windows(width)} Cosine: mean over the factored matrices in the blocks."
    return set_side_by_side(
        _curve_chart(cohort, "loss", _average_windows(losses, width), caption),
        _curve_chart(cohort, "direction_cosine", angles, caption),
    )


@figure(
    topic="schedules",
    needs=("eval_loss", "test_loss"),
    reads="Left: validation loss by learning rate; a minimum inside the range means that the range includes the best "
    "rate. Right: test loss at the rate with the lowest validation loss; overlapping intervals mean that the seeds do "
    "not order the methods.",
    misleads="A best rate at an end of the range may not be the best overall: extend the range. Short training favors "
    "methods that move fast at first, and equal rates are not comparable between methods.",
)
def learning_rates(runs: Runs, control: Runs | None = None) -> Panels:
    """Plot validation loss by learning rate, and the test loss of each method at its best rate.

    Parameters
    ----------
    runs, control : mapping label -> runs
        Runs labeled "METHOD at RATE"; the method is the part before " at ".

    Examples
    --------
    >>> ls.plots.learning_rates(learning_rates)
    """
    cohort = gather("learning_rates", runs, control)
    cohort.require("eval_loss", "test_loss")
    cells = optimizer_moments.rates(
        cohort.label(cohort.table), {run.id: run.meta.settings["lr"] for run in cohort.runs}
    )
    chosen = optimizer_moments.best(cells["eval_loss"])
    methods = list(dict.fromkeys(cells["eval_loss"]["method"]))
    tested = cells["test_loss"].merge(chosen, on=["method", "lr"])
    tested = tested.assign(at=tested["method"])
    rates = "; ".join(f"{row.method} {row.lr:.3g}" for row in chosen.itertuples())
    caption = cohort.caption(
        f"Best learning rates by mean final validation loss: {rates}.",
        *cohort.dense_moment_note(),
        interval=f"bars: {INTERVAL}",
    )
    panels = []
    for x, table, title, quantity in (
        ("lr", cells["eval_loss"], "by learning rate", "eval_loss"),
        ("at", tested, "at the best rate", "test_loss"),
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
    return f"Training loss averaged over windows of {width} steps." if width > 1 else "Training loss of every step."


def _average_windows(rows: pd.DataFrame, width: int) -> pd.DataFrame:
    """Average every run over windows of ``width`` steps; each mean has the last step of its window."""
    last = rows.groupby("run", observed=True)["step"].transform("max")
    end = (-(-rows["step"] // width) * width).clip(upper=last)
    windows = rows.assign(step=end).groupby(["run", "recipe", "kind", "step"], observed=True, sort=False)
    return windows["value"].mean().reset_index()
