"""Figures of norms: by layer, by block and role, over the steps, and averaged over training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope.analysis import norms
from lorascope.analysis.even_spacing import select_steps
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, wrap
from lorascope.charts.marks import Axis, Heat, Point
from lorascope.charts.scales import to_floats
from lorascope.plots.builders import heat_by_role, profile
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import PAIR_IN_DATA, Cohort, Runs, axis_label, define, require_counts
from lorascope.schema.records import QUANTITIES

_CELL = ["recipe", "kind", "place"]
_OF_UPDATES = ("update_norm", "learned_norm", "relative_update")
_MOST_LABELED = 12  # largest number of columns, over all panels, whose cells have room for numbers
_MOST_DIGITS = 6  # of a number in a cell, before its exponent is shown
_READINGS = {"weight_norm": "Whole weight", "update_norm": "Update", "adapter_norm": "Adapter"}


@figure(
    topic="updates",
    needs=("update_norm",),
    reads="Each point is the norm of the update of one layer; high points are layers that changed most. Where the "
    "bands of two recipes overlap, the seeds do not distinguish them.",
    misleads="Layers with more weights have larger norms for the same change per weight, so embeddings and heads are "
    "high for their size: compare relative_update. Learning rates set the height of a curve: compare shapes.",
)
def update_norm(runs: Runs, control: Runs | None = None, quantity: str | None = None) -> Chart:
    """Plot the norm of the update by layer, one line per recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    quantity : str, optional
        Recorded quantity of modules. By default ``update_norm``; for several recipes that all recorded it,
        ``learned_norm``, because the initial update of some methods is nonzero.

    Examples
    --------
    >>> ls.plots.update_norm({"full fine-tuning": ls.example("full"), "LoRA": ls.example("lora")})
    """
    cohort = gather_runs("update_norm", runs, control, check=False)
    quantity = quantity or _comparable_quantity(cohort)
    cohort.require(quantity)
    return cohort.complete(update_profile(cohort, quantity, _title(quantity)))


def _title(quantity: str) -> str:
    return "Update by layer" if quantity in _OF_UPDATES else f"{QUANTITIES[quantity].label.capitalize()} by layer"


def update_profile(cohort: Cohort, quantity: str, title: str, log: bool = False) -> Chart:
    """Plot the norm, or another quantity, of modules at the last step, pooled by layer, one line per recipe."""
    cells = cohort.label(norms.last_recorded(_layers(cohort, quantity)))
    caption = cohort.caption(f"{define(quantity)} {_step_phrase(cells)}")
    return profile(
        cohort, seed_cells(cells, _CELL), Axis(label=axis_label(quantity), log=log), title=title, caption=caption
    )


@figure(
    topic="updates",
    needs=("update_norm",),
    reads="Each cell is the norm of the update of one role in one block; hatched cells: no data. Rows compare the "
    "depth of blocks, columns the roles within a block.",
    misleads="Rows of larger matrices, such as the feed-forward ones, are brighter for their size: compare "
    "relative_update. Colors show means: differences within the caption's interval do not order cells.",
)
def update_norm_heat(runs: Runs, control: Runs | None = None, quantity: str | None = None) -> Drawable:
    """Plot the norm of the update by block and role, one panel per recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    quantity : str, optional
        Recorded quantity of modules; by default as for `update_norm`.

    Examples
    --------
    >>> ls.plots.update_norm_heat({"full fine-tuning": ls.example("full"), "LoRA": ls.example("lora")})
    """
    cohort = gather_runs("update_norm_heat", runs, control, check=False)
    quantity = quantity or _comparable_quantity(cohort)
    cohort.require(quantity)
    # The embedding and the head have no block.
    inside = norms.select_quantity(cohort.table, quantity).dropna(subset="layer")
    if inside.empty:
        raise ValueError(f"{cohort.name} needs {quantity} of modules inside blocks, got none")
    pooled = norms.last_recorded(norms.pool_modules(inside, by=("place", "role")))
    cells = seed_cells(cohort.label(pooled), [*_CELL, "role"])
    largest = float(pd.Series(to_floats(cells["value"])).max())
    half: float = ((cells["high"] - cells["low"]) / 2 / cells["value"]).max()
    sentences = f"{cohort.setting()} {define(quantity)} {_step_phrase(pooled)}".lstrip()
    if math.isfinite(half):  # a cell of zeros has no relative width
        sentences += f" Widest interval of a cell: ±{half:.0%}."
    if len(cells) < math.prod(cells[[*_CELL, "role"]].nunique()):
        sentences += " Hatched: no update recorded."
    title = _title(quantity).replace("layer", "block and role")
    if quantity in _OF_UPDATES and (finding := _compare_recipes(cells)):
        title += f": {finding}"
        sentences += " Title: mean over the cells that all panels have."
    caption = cohort.caption(sentences, interval="95% t-intervals are in the data", pair=PAIR_IN_DATA)
    text: str | None = None
    limits: Any = None
    if largest > 0:
        limits = (0.0, None)
        if len(cells[["recipe", "place"]].drop_duplicates()) <= _MOST_LABELED:
            digits = 2 - math.floor(math.log10(largest))  # three digits for the largest
            text = f".{max(0, digits)}f" if abs(digits) < _MOST_DIGITS else ".2e"
    heat = Heat("place", "role", "value", axis_label(quantity), text, limits=limits)
    panels = heat_by_role(cells, cohort.labels, lambda _: heat, "block", caption)
    return cohort.complete(wrap(panels, len(panels), title))


def _compare_recipes(cells: pd.DataFrame) -> str:
    """Return which recipe has the largest update over the cells that all have, and how large, or "" for equal ones."""
    shared = cells.pivot_table(index=["place", "role"], columns="recipe", values="value", observed=True).dropna()
    means = shared.mean()
    if len(means) < 2 or not means.min() > 0 or f"{means.max() / means.min():.1f}" == "1.0":
        return ""
    return f"largest with {means.idxmax()}, {means.max() / means.min():.1f} times that with {means.idxmin()}"


@figure(
    topic="updates",
    needs=("update_norm",),
    history=True,
    reads="The frames show the profile at successive steps, all on one scale. A layer that stops rising early has "
    "converged; a layer that rises to the end has not.",
    misleads="A decaying learning rate slows down every layer, so a flat end does not prove convergence: train longer "
    "at a constant rate. Early frames are small because the update of most methods starts at zero.",
)
def norm_over_steps(runs: Runs, control: Runs | None = None, quantity: str = "update_norm", frames: int = 30) -> Chart:
    """Plot the norm of the update by layer, with the step on a slider.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    quantity : str
        Recorded quantity of modules.
    frames : int
        Maximum number of steps shown, evenly spaced among those that all runs recorded.

    Examples
    --------
    >>> ls.plots.norm_over_steps({"full fine-tuning": ls.example("full"), "LoRA": ls.example("lora")})
    """
    cohort = gather_runs("norm_over_steps", runs, control, check=False)
    require_counts(frames=frames)
    rows = _layers(cohort, quantity, history=True)
    # The update of most methods starts at zero, so that a frame of step 0 would show nothing.
    is_drawn = rows.groupby("step")["value"].transform(lambda values: values.abs().max() > 0)
    if is_drawn.any():
        rows = rows[is_drawn]
    cells = seed_cells(cohort.label(select_steps(rows, frames)), ["step", *_CELL])
    last = seed_cells(cohort.label(norms.last_recorded(rows)), _CELL)
    caption = cohort.caption(define(quantity))
    title = f"{_title(quantity)} (hollow: last step)"
    chart = profile(cohort, cells, axis_label(quantity), title=title, caption=caption, frame="step")
    ends = Point("place", "value", "recipe", hollow=True, data=last)
    return cohort.complete(replace(chart, marks=(ends, *chart.marks)))


@figure(
    topic="updates",
    needs=("weight_norm", "update_norm"),
    history=True,
    reads="Each panel is one reading of LISA's weight norm, averaged over the steps of training; hollow marks are step "
    "0. A skew toward the first and last layers was learned only as far as the distance from hollow marks shows it.",
    misleads="A norm can stay equal while the weight rotates: a change of 0% does not mean an unchanged weight. The "
    "adapter norm is mostly initialization, because B of an embedding starts random and large: compare distances to "
    "step 0, not heights.",
)
def mean_norm(runs: Runs, control: Runs | None = None, per_weight: bool = False) -> Drawable:
    """Plot norms by layer averaged over training, for each reading of "weight norm" (LISA, section 3.1 and Fig. 2).

    LISA's Figure 2 suggests that LoRA mostly changes the first and last layers. The panels show the norms of weight and
    update and, for recipes with adapters, of the adapter, each with its value at step 0. The norm of a weight hardly
    changes, so it is in percent of step 0, if all runs recorded that; titles of the others have the smallest and
    largest percentage at step 0. The update of an embedding's adapter scales with its random B.
    If the head is tied to the embedding, compare with the head, whose adapter has no such B.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    per_weight : bool
        Divide norms that are not in percent by the root of the number of weights, which makes layers comparable.

    Examples
    --------
    >>> ls.plots.mean_norm({"full fine-tuning": ls.example("full"), "LoRA": ls.example("lora")})
    """
    cohort = gather_runs("mean_norm", runs, control)
    quantities = ("weight_norm", "update_norm")
    layers = {name: _layers(cohort, name) for name in quantities}
    if per_weight:
        modules = pd.concat([run.modules for run in cohort.runs])
        # No panels of adapter norms: they are the norms of A and B, so that no weight of the layer divides them.
        for name in quantities:
            layers[name] = norms.norm_per_weight(norms.select_quantity(cohort.table, name), modules)
    elif (cohort.table["quantity"] == "adapter_norm").any():
        layers["adapter_norm"] = norms.pool_modules(norms.select_quantity(cohort.table, "adapter_norm"))
    caption = "Mean over the recorded steps after step 0; percentages in titles: step 0 over this mean, in every layer."
    if per_weight:
        caption += " Norms are divided by √n, where n is the number of weights in the matrices of a layer."
    panels = []
    for name, rows in layers.items():
        label = axis_label(name) + " / √n" * per_weight
        # A weight's norm over the steps is too similar to that at step 0 to be distinguished on its own axis.
        is_percent = name == "weight_norm" and (rows["step"] == 0).groupby(rows["run"], observed=True).any().all()
        if is_percent:
            rows, label = norms.percent_change(rows), "change of ‖W‖ (%)"
        # Mean over the steps first, then mean and band over seeds.
        cells = seed_cells(cohort.label(norms.mean_over_steps(rows)), _CELL).assign(metric=name)
        start = seed_cells(cohort.label(rows[(rows["step"] == 0).fillna(False)]), _CELL)
        title = f"{_READINGS[name]}{_percent_at_start(cells, start)}"
        if is_percent:
            title = f"{_READINGS[name]}, change"
        chart = profile(cohort, cells, label, title=title, caption=cohort.caption(caption))
        hollow = Point("place", "value", "recipe", hollow=True, data=start)
        panels.append(replace(chart, marks=(hollow, *chart.marks)))
    return cohort.complete(wrap(panels, len(panels), "Norm by layer, mean over training (hollow: step 0)"))


def _percent_at_start(cells: pd.DataFrame, start: pd.DataFrame) -> str:
    """Return the smallest and largest percentage of a norm that it had at step 0, as the end of a title."""
    percent = 100 * start.set_index(_CELL)["value"] / cells.set_index(_CELL)["value"]
    ends = dict.fromkeys(f"{end:.0f}" for end in (percent.min(), percent.max()) if math.isfinite(end))
    # Checkpoints without step 0 have no percentage.
    return f": {'–'.join(ends)}% at step 0" * bool(ends)


def _comparable_quantity(cohort: Cohort) -> str:
    """Return the norm that is comparable between the recipes shown."""
    if len(cohort.groups) > 1 and cohort.has_recorded("learned_norm"):
        return "learned_norm"
    return "update_norm"


def _layers(cohort: Cohort, quantity: str, history: bool = False) -> pd.DataFrame:
    cohort.require(quantity, history=history)
    return norms.pool_modules(norms.select_quantity(cohort.table, quantity))


def _step_phrase(cells: pd.DataFrame) -> str:
    steps = sorted(cells["step"].dropna().unique())
    if not steps:
        return "As stored."
    return f"After step {', '.join(map(str, steps))}."
