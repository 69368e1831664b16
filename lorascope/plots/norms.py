"""Figures of norms: by layer, by block and role, over the steps, and averaged over training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from lorascope.analysis import norms
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Chart, Drawable, Heat, wrap
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import Cohort, Runs, axis_label, define, gather, lines
from lorascope.schema.module_roles import ROLES

_CELL = ["recipe", "kind", "place"]
_MOST_LABELED = 12  # largest number of columns, over all panels, whose cells have room for numbers
_SINCE_START = "adapter_norm minus step 0"


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
    >>> ls.plots.update_norm({"full fine-tuning": full, "LoRA": lora})
    """
    cohort = gather("update_norm", runs, control)
    quantity = quantity or _comparable_quantity(cohort)
    cells = cohort.label(norms.last(_layers(cohort, quantity)))
    return _layer_profile(
        cohort, band(cells, _CELL), axis_label(quantity), "Update by layer", f"{define(quantity)} {_step_phrase(cells)}"
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
    >>> ls.plots.update_norm_heat({"full fine-tuning": full, "LoRA": lora})
    """
    cohort = gather("update_norm_heat", runs, control)
    quantity = quantity or _comparable_quantity(cohort)
    cohort.require(quantity)
    inside = norms.select(cohort.table, quantity).dropna(subset="layer")
    pooled = norms.last(norms.pool(inside, by=("place", "role")))
    cells = band(cohort.label(pooled), [*_CELL, "role"])
    limits = (0.0, float(cells["value"].max()))
    half: float = ((cells["high"] - cells["low"]) / 2 / cells["value"]).max()
    widest = "" if pd.isna(half) else f" Widest interval of a cell: ±{half:.0%}."
    caption = f"{define(quantity)} {_step_phrase(pooled)}{widest}"
    panels = [
        Chart(
            cells[cells["recipe"] == label],
            [Heat("place", "role", "value", axis_label(quantity), _text(cells), limits=limits)],
            title=label,
            x=Axis(label="block", order=_axis_places(cells)),
            y=Axis(order=[role for role in ROLES if role in set(cells["role"])]),
            caption=cohort.caption(caption, interval="95% t-intervals are in the data"),
            meta=cohort.meta,
        )
        for label in cohort.labels
    ]
    return wrap(panels, len(panels))


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
    >>> ls.plots.norm_over_steps({"full fine-tuning": full, "LoRA": lora})
    """
    cohort = gather("norm_over_steps", runs, control)
    cells = cohort.label(norms.frames(_layers(cohort, quantity, history=True), frames))
    return _layer_profile(
        cohort, band(cells, ["step", *_CELL]), axis_label(quantity), "Update by layer", define(quantity), frame="step"
    )


@figure(
    topic="updates",
    needs=("weight_norm", "update_norm"),
    history=True,
    reads="Each panel is one reading of LISA's weight norm, averaged over the steps of training. A skew toward the "
    "first and last layers was learned only if it remains in the adapter norm minus its value at step 0.",
    misleads="The norm of the whole weight hardly changes in training, so the first panel shows the base model. The "
    "raw adapter norm is mostly initialization, because B of an embedding starts random and large: use the panel minus "
    "step 0.",
)
def mean_norm(runs: Runs, control: Runs | None = None, per_weight: bool = False) -> Drawable:
    """Plot norms by layer averaged over training, for each reading of "weight norm" (LISA, section 3.1 and Fig. 2).

    LISA's Figure 2 suggests that LoRA mostly changes the first and last layers. The panels show the norms of weight and
    update and, for recipes with adapters, the adapter norm and the adapter norm minus its value at step 0. The update
    starts at zero, but the update of an embedding's adapter scales with its random B. If the head is tied to the
    embedding, compare with the head, whose adapter has no such B.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    per_weight : bool
        Divide the norms of weight and update by the root of the number of weights, which makes layers comparable.

    Examples
    --------
    >>> ls.plots.mean_norm({"full fine-tuning": full, "LoRA": lora})
    """
    cohort = gather("mean_norm", runs, control)
    cohort.require("weight_norm", "update_norm", history=True)
    if per_weight:
        modules = pd.concat([run.modules for run in cohort.runs])
        rows = {name: norms.select(cohort.table, name) for name in ("weight_norm", "update_norm")}
        layers = {name: norms.per_weight(found, modules) for name, found in rows.items()}
    else:
        layers = {name: _layers(cohort, name) for name in ("weight_norm", "update_norm")}
        if (cohort.table["quantity"] == "adapter_norm").any():
            adapters = norms.pool(norms.select(cohort.table, "adapter_norm"))
            layers |= {"adapter_norm": adapters, _SINCE_START: norms.since_start(adapters)}
    panels = [_mean_panel(cohort, name, cells, layers, per_weight) for name, cells in layers.items()]
    return wrap(panels, 2)


def _mean_panel(
    cohort: Cohort, name: str, cells: pd.DataFrame, layers: Mapping[str, pd.DataFrame], per_weight: bool
) -> Chart:
    """Plot one reading: mean over the steps first, then mean and band over seeds."""
    quantity = "adapter_norm" if name == _SINCE_START else name
    label = f"{axis_label(quantity)} − step 0" if name == _SINCE_START else axis_label(quantity)
    table = band(cohort.label(norms.mean_over_steps(cells)), _CELL).assign(metric=name)
    caption = f"By layer, mean over the recorded steps after step 0: {', '.join(map(_spaced_name, layers))}."
    if per_weight:
        label = f"{label} / √n"
        caption += " Norms are divided by √n, where n is the number of weights in the matrices of a layer."
    return _layer_profile(cohort, table, label, _spaced_name(name), caption, log=name != _SINCE_START)


def _spaced_name(name: str) -> str:
    return name.replace("_", " ")


def _comparable_quantity(cohort: Cohort) -> str:
    """Return the norm that is comparable between the recipes shown."""
    recorded = cohort.table.loc[cohort.table["quantity"] == "learned_norm", "run"].nunique()
    return "learned_norm" if len(cohort.groups) > 1 and recorded == len(cohort.runs) else "update_norm"


def _layers(cohort: Cohort, quantity: str, history: bool = False) -> pd.DataFrame:
    cohort.require(quantity, history=history)
    return norms.pool(norms.select(cohort.table, quantity))


def _layer_profile(
    cohort: Cohort,
    cells: pd.DataFrame,
    label: str,
    title: str,
    caption: str,
    *,
    log: bool = False,
    frame: str | None = None,
) -> Chart:
    """Plot lines over the layers, one per recipe, with gaps where a recipe has no record."""
    cells = _add_gaps(cells)
    return Chart(
        cells,
        lines(cells, "place"),
        title=title,
        x=Axis(label="layer", order=_axis_places(cells)),
        y=Axis(label=label, log=log),
        caption=cohort.caption(caption),
        frame=frame,
        colors=cohort.labels,
        meta=cohort.meta,
    )


def _add_gaps(cells: pd.DataFrame) -> pd.DataFrame:
    """Add rows with unknown values for every recipe (and step) at places where it has no record."""
    rows = cells[[column for column in ("step", "recipe", "kind") if column in cells]].drop_duplicates()
    places = pd.Categorical(_axis_places(cells), cells["place"].cat.categories, ordered=True)
    full = rows.merge(pd.DataFrame({"place": places}), how="cross").merge(cells, how="left")
    return full.fillna({"n": 0}).astype({"n": "int64"})


def _axis_places(cells: pd.DataFrame) -> list[str]:
    used = set(cells["place"])
    return [name for name in cells["place"].cat.categories if name in used]


def _text(cells: pd.DataFrame) -> str | None:
    """Return the format of the numbers in cells, three digits for the largest; None if there is no room."""
    largest = cells["value"].max()
    if cells[["recipe", "place"]].drop_duplicates().shape[0] > _MOST_LABELED or not largest > 0:
        return None
    return f".{max(0, 2 - math.floor(math.log10(largest)))}f"


def _step_phrase(cells: pd.DataFrame) -> str:
    steps = sorted(cells["step"].dropna().unique())
    return f"After step {', '.join(map(str, steps))}." if steps else "As stored."
