"""Figures of training: loss and metric over the steps, cosine guidance, and loss by learning rate."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from lorascope.analysis.learning_rates import average_losses_by_rate, best_rates
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, wrap
from lorascope.charts.marks import Axis, Band, Line, Mark, Rule
from lorascope.plots.builders import course, dots, mean_over_modules, paired_differences
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import INTERVAL, PAIR, Cohort, Runs, axis_label, require_counts


@figure(
    topic="schedules",
    needs=("loss",),
    history=True,
    reads="Lower losses and higher accuracies are better; where the bars of two recipes at the last step overlap, the "
    "seeds do not order them. A falling training loss with a growing validation loss means overfitting.",
    misleads="The training loss is averaged over windows of steps, so it lags and hides spikes: use more windows. The "
    "best state is chosen on validation, so its validation score is optimistic: judge runs on the test split.",
)
def training_curves(runs: Runs, control: Runs | None = None, windows: int = 25) -> Drawable:
    """Plot learning curves: training loss and, if recorded, validation loss and metric other than perplexity.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    windows : int
        Maximum number of windows of equal length over which the training loss is averaged.

    Examples
    --------
    >>> ls.plots.training_curves({"full fine-tuning": ls.example("full"), "LoRA": ls.example("lora")})
    """
    cohort = gather_runs("training_curves", runs, control)
    losses, averaged = _average_windows(cohort, windows)
    panels = [_curve_chart(cohort, "loss", losses, averaged)]
    labels = {"eval_loss": axis_label("eval_loss"), "eval_metric": cohort.metric.replace("test", "validation", 1)}
    for quantity, label in labels.items():
        rows = cohort.select(quantity)
        # A perplexity is the exponential of the loss, so its curve would be the same.
        if len(rows) and not label.endswith("perplexity"):
            panels.append(_curve_chart(cohort, quantity, rows, averaged, label))
    return cohort.complete(wrap(panels, len(panels), "Learning curves"))


@figure(
    topic="optimizers",
    needs=("loss", "direction_cosine"),
    history=True,
    reads="Left: training loss, and its difference from the first recipe by seed; right: the cosine c, where guidance "
    "divides the step by 1 − c. Guidance helps only if it also beats a higher learning rate without it.",
    misleads="The paper's formula and results could not be verified, and the first step depends only on the floor, "
    "because its cosine is 1. Independent directions already have cosine 0.44 with their average at β₁ = 0.9, so steps "
    "grow even without a signal.",
)
def guidance(runs: Runs, control: Runs | None = None, windows: int = 25) -> Panels:
    """Plot learning curves with and without cosine guidance, and the cosine of direction and first moment (Adapprox).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of Adapprox, some of them with ``cosine=True``.
    windows : int
        Maximum number of windows of equal length over which the training loss is averaged.

    Examples
    --------
    ``guided`` are runs of ``ls.Adapprox(cosine=...)``.

    >>> ls.plots.guidance(guided)
    """
    cohort = gather_runs("guidance", runs, control)
    losses, averaged = _average_windows(cohort, windows)
    cosines = mean_over_modules(cohort.select("direction_cosine").dropna(subset="layer"))
    cosines = cosines[cosines["step"] > 1]
    caption = f"{averaged} Cosine: mean over the factored matrices in the blocks, without step 1, where it is 1."
    loss = replace(_curve_chart(cohort, "loss", losses, caption, bars=False), title="Training loss")
    cosine = _curve_chart(cohort, "direction_cosine", cosines, caption, bars=False)
    random = _independent_directions(cohort, cosines["step"].drop_duplicates())
    cosine = replace(
        cosine,
        marks=(Band("step", "low", "high", "recipe"), *cosine.marks, Line("step", "value", "recipe", data=random)),
        title="Cosine with the average",
        colors=[*cohort.labels, *dict.fromkeys(random["recipe"])],
    )
    panels = [loss, cosine]
    # Seeds differ more in their loss than in the effect of guidance, which pairs show.
    differences = paired_differences(cohort, losses, cohort.labels[0])
    if len(differences):
        y, look = f"loss − {cohort.labels[0]}", {"colors": cohort.labels, "caption": loss.caption}
        paired = course(differences, y, title="Difference, paired by seed", whiskers=False, **look)
        panels.insert(1, replace(paired, marks=(Rule(y=0), *paired.marks)))
    return cohort.complete(set_side_by_side(*panels, title="Adapprox with and without guidance"))


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
    """Plot validation loss by learning rate as one curve per method, and the test loss of each at its best rate.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs labeled "METHOD at RATE"; the method is the part before " at ". Each has at least one of the losses.

    Examples
    --------
    ``learning_rates`` are runs of ``ls.Full`` and ``ls.LoRA`` with five rates each, by label.

    >>> ls.plots.learning_rates(learning_rates)
    """
    cohort = gather_runs("learning_rates", runs, control, check=False)
    if not {"eval_loss", "test_loss"} <= set(cohort.table["quantity"]):
        cohort.require("eval_loss", "test_loss")
    rates = {run.id: run.meta.settings["lr"] for run in cohort.runs}
    cells = average_losses_by_rate(cohort.label(cohort.table), rates)
    best = best_rates(cells["eval_loss"])
    methods = list(dict.fromkeys(cells["eval_loss"]["method"]))
    tested = cells["test_loss"].merge(best, on=["method", "lr"])
    tested = tested.assign(at=tested["method"]).sort_values("value", kind="stable")
    listed_rates = "; ".join(best["method"] + best["lr"].map(" {:.3g}".format))
    caption = cohort.caption(
        f"Best learning rates by mean final validation loss: {listed_rates}.",
        *cohort.method_notes(),
        interval=f"bars: {INTERVAL}",
    )
    by_rate = Chart(
        cells["eval_loss"],
        [Line("lr", "value", "method"), *dots(cells["eval_loss"], "lr", color="method")],
        title="Validation loss by learning rate",
        x=Axis(label="learning rate", log=True),
        y=Axis(label=axis_label("eval_loss")),
        caption=caption,
        colors=methods,
    )
    at_best = Chart(
        tested,
        dots(tested, "value", "at", "method"),
        title="Test loss at the best rate",
        x=Axis(label=axis_label("test_loss")),
        y=Axis(order=tested["at"], compact=True),
        caption=caption,
        colors=methods,
    )
    return cohort.complete(set_side_by_side(by_rate, at_best, title="Loss by learning rate"))


def _independent_directions(cohort: Cohort, steps: pd.Series) -> pd.DataFrame:
    """Return the cosine of independent directions with their average at every step, per decay of the average."""
    decays = {run.meta.recipe["betas"][0] for run in cohort.runs if "betas" in run.meta.recipe}
    rows = []
    for decay in sorted(decays):
        label = "independent directions" + f", β₁ = {decay:g}" * (len(decays) > 1)
        for step in steps:
            rows.append((step, math.sqrt(1 - decay**2), label))
    return pd.DataFrame(rows, columns=["step", "value", "recipe"])


def _curve_chart(
    cohort: Cohort, quantity: str, rows: pd.DataFrame, averaged: str, label: str = "", bars: bool = True
) -> Chart:
    """Draw the means of recipes over the steps, with ``bars`` also the spread of their seeds at the last of each."""
    cells = seed_cells(rows, ["recipe", "kind", "step"]).assign(quantity=quantity)
    ends: list[Mark] = []
    spread = "bands"
    if bars:
        spread = "bars"
        last = cells[cells["step"] == cells.groupby("recipe")["step"].transform("max")]
        ends = dots(last, "step", color="recipe", data=last)
    label = label or axis_label(quantity)
    title = label.partition(" (")[0].capitalize()
    return course(
        cells,
        # Training and validation losses share their axis.
        label.removeprefix("training ").removeprefix("validation "),
        *ends,
        points=quantity != "loss",  # its dots would hide the line
        spread=False,  # bands of several recipes would cover each other
        title=title,
        caption=cohort.caption(averaged, *cohort.method_notes(), interval=f"{spread}: {INTERVAL}", pair=PAIR),
        colors=cohort.labels,
    )


def _average_windows(cohort: Cohort, count: int) -> tuple[pd.DataFrame, str]:
    """Average the training loss of every run over windows of steps, each with its last step, and describe them."""
    require_counts(windows=count)
    rows = cohort.select("loss")
    width = math.ceil(rows["step"].max() / count)
    last = rows.groupby("run", observed=True)["step"].transform("max")
    # A window is drawn at its last step; the last window may be shorter.
    end = (-(-rows["step"] // width) * width).clip(upper=last)  # rounded up
    averages = (
        rows.assign(step=end).groupby(["run", "recipe", "kind", "step"], observed=True, sort=False)["value"].mean()
    )
    sentence = f"Training loss averaged over windows of {width} steps." if width > 1 else "Training loss of every step."
    return averages.reset_index(), sentence
