"""Figures of norms: by layer, by layer and role, over steps, and averaged over training."""

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
_MOST_LABELLED = 12  # columns of cells, in all panels, that still have room for numbers
_SINCE_START = "adapter_norm minus its start"


@figure(
    needs=("update_norm",),
    reads="Each point is the norm of everything a layer's weights have moved away from the base; a high point is "
    "where training put its change. Where bands of two recipes overlap, the seeds do not tell them apart.",
    misleads="A layer with more weights has a larger norm for the same change per weight, so embeddings and heads "
    "tower for their size alone. Recipes at different learning rates differ in height: compare the shapes.",
)
def update_norm(runs: Runs, control: Runs | None = None, quantity: str | None = None) -> Chart:
    """Norm of the update by layer, one line a recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    quantity : str, optional
        A recorded quantity of modules. Default: ``update_norm``; where several recipes are compared and all have it,
        ``learned_norm``, since some methods start away from zero.
    """
    cohort = gather("update_norm", runs, control)
    quantity = quantity or _comparable_quantity(cohort)
    cells = cohort.label(norms.last(_layers(cohort, quantity)))
    return _layer_profile(
        cohort, band(cells, _CELL), axis_label(quantity), "Update by layer", f"{define(quantity)} {_step_phrase(cells)}"
    )


@figure(
    needs=("update_norm",),
    reads="A cell is the update of one role of weight in one block; hatched cells hold no adapted weight. Compare "
    "along a row for depth, along a column for the division of work inside a block.",
    misleads="Rows of larger matrices (the feed-forward ones) are brighter for their size alone. The colours show "
    "means: two cells closer than the interval that the caption states are not to be ranked.",
)
def update_norm_heat(runs: Runs, control: Runs | None = None, quantity: str | None = None) -> Drawable:
    """Norm of the update by block and role, one panel a recipe. Parameters as in :func:`update_norm`."""
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
            caption=cohort.caption(caption, interval="95 % t-intervals in the data"),
            meta=cohort.meta,
        )
        for label in cohort.labels
    ]
    return wrap(panels, len(panels))


@figure(
    needs=("update_norm",),
    history=True,
    reads="Move the slider to watch the profile grow; all frames share one scale. A layer whose line stops rising "
    "early has settled, one that rises to the end has not.",
    misleads="Under a decaying learning rate every layer slows down, so flattening alone says nothing about being "
    "done. The first frames are small by construction: the update starts at zero.",
)
def norm_over_steps(runs: Runs, control: Runs | None = None, quantity: str = "update_norm", frames: int = 30) -> Chart:
    """Norm of the update by layer with the step on a slider.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    quantity : str
        A recorded quantity of modules.
    frames : int
        Number of steps shown, evenly taken from those that all runs recorded.
    """
    cohort = gather("norm_over_steps", runs, control)
    cells = cohort.label(norms.frames(_layers(cohort, quantity, history=True), frames))
    return _layer_profile(
        cohort, band(cells, ["step", *_CELL]), axis_label(quantity), "Update by layer", define(quantity), frame="step"
    )


@figure(
    needs=("weight_norm", "update_norm"),
    history=True,
    reads="LISA's Figure 2 asks whether LoRA works mostly on the first and last layers; each panel is one reading of "
    "'weight norm', averaged over the steps of training. A skew counts as learned if it shows in the adapter norm "
    "after its start is taken off. The update starts at zero, but that of an embedding's adapter scales with its "
    "random B: where the head is the same matrix, its end has no such B and is the comparison.",
    misleads="The norm of the whole weight hardly changes in training, so the first panel is a picture of the base. "
    "The raw adapter norm is mostly initialisation: B of an embedding starts random and huge.",
)
def mean_norm(runs: Runs, control: Runs | None = None, per_weight: bool = False) -> Drawable:
    """Norms by layer averaged over training, in the readings that the word allows (LISA, section 3.1 and Fig. 2).

    Panels: weight, update and, for recipes with adapters, the adapters' norm as it is and minus its value at step 0.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    per_weight : bool
        Weight and update over the root of the number of weights, since layers of more weights have larger norms.
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
    """One reading: mean over the steps first, then mean and band over seeds."""
    quantity = "adapter_norm" if name == _SINCE_START else name
    label = f"{axis_label(quantity)} − start" if name == _SINCE_START else axis_label(quantity)
    table = band(cohort.label(norms.mean_over_steps(cells)), _CELL).assign(metric=name)
    caption = f"Mean over the recorded steps after 0 of {', '.join(map(_spaced_name, layers))}, by layer."
    if per_weight:
        label = f"{label} / √n"
        caption += " Over the root of the number n of weights of a layer, matrices alone."
    return _layer_profile(cohort, table, label, _spaced_name(name), caption, log=name != _SINCE_START)


def _spaced_name(name: str) -> str:
    return name.replace("_", " ")


def _comparable_quantity(cohort: Cohort) -> str:
    """The quantity that is fair to all recipes shown."""
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
    """Lines over the layers, one a recipe, with a gap where a recipe has no record."""
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
    """A row for every recipe (and step) at every place, unknown where nothing was recorded."""
    rows = cells[[column for column in ("step", "recipe", "kind") if column in cells]].drop_duplicates()
    places = pd.Categorical(_axis_places(cells), cells["place"].cat.categories, ordered=True)
    full = rows.merge(pd.DataFrame({"place": places}), how="cross").merge(cells, how="left")
    return full.fillna({"n": 0}).astype({"n": "int64"})


def _axis_places(cells: pd.DataFrame) -> list[str]:
    used = set(cells["place"])
    return [name for name in cells["place"].cat.categories if name in used]


def _text(cells: pd.DataFrame) -> str | None:
    """Format of the numbers in cells, three digits for the largest; None where they have no room."""
    largest = cells["value"].max()
    if cells[["recipe", "place"]].drop_duplicates().shape[0] > _MOST_LABELLED or not largest > 0:
        return None
    return f".{max(0, 2 - math.floor(math.log10(largest)))}f"


def _step_phrase(cells: pd.DataFrame) -> str:
    steps = sorted(cells["step"].dropna().unique())
    return f"After step {', '.join(map(str, steps))}." if steps else "As stored."
