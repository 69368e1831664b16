"""Recorded values as they are, nothing pooled: what is drawn of one quantity while somebody picks from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Band, Chart, Line, Mark, Point, Rule
from lorascope.plots.registry import MIXTURES, mixture_sentences
from lorascope.plots.run_groups import Cohort, axis_label
from lorascope.schema.records import QUANTITIES

_VALUE = ["recipe", "kind", "step", "module", "place", "role", "index"]
UNSTEPPED = -1  # the step of what was stored without one, as in an adapter's folder
_MOST_DOTTED = 60  # values over the steps that still get a dot each


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Every value of one quantity, as recorded by one run; of several seeds their mean and interval.

    Parameters
    ----------
    rows : DataFrame
        From ``Cohort.label``, with ``place``.
    """
    return band(rows, _VALUE)


def at_step(table: pd.DataFrame, step: int) -> pd.DataFrame:
    """Rows of one step; ``UNSTEPPED`` stands for what was stored without one."""
    return table[table["step"].fillna(UNSTEPPED) == step]


def values(cohort: Cohort, quantity: str, table: pd.DataFrame, step: int) -> Chart:
    """Values by layer and role at one step, of a single module by component, and of the whole run over the steps.

    Parameters
    ----------
    cohort : Cohort
        Whose values they are.
    quantity : str
        Which quantity.
    table : DataFrame
        From ``cells``, at all steps: they give the vertical axis, which so keeps still while the step changes.
    step : int
        The step shown, as for ``at_step``.
    """
    cohort, entry = replace(cohort, name=quantity), QUANTITIES[quantity]
    x = _horizontal_axis(table)
    shown = table if x == "step" else at_step(table, step)
    when = "as stored" if step == UNSTEPPED else f"after step {step}"
    axes = {
        "index": Axis(label=entry.index.replace("_", " ")),
        "step": Axis(label="step"),
        "place": Axis(label="layer", order=list(table["place"].cat.remove_unused_categories().cat.categories)),
    }
    meta = cohort.meta
    told = cohort.caption(f"{entry.label}: {entry.definition}.")
    return Chart(
        shown,
        [*_marks(shown, x), *([Rule(x=step)] if x == "step" and step != UNSTEPPED else [])],
        title=quantity.replace("_", " ") if x == "step" else f"{quantity.replace('_', ' ')}, {when}",
        x=axes[x],
        y=Axis(label=axis_label(quantity), limits=None if x == "step" else _vertical_ends(table)),
        caption=" ".join([told, *mixture_sentences(meta.get(MIXTURES, {}))]),
        meta=meta,
    )


def _horizontal_axis(table: pd.DataFrame) -> str:
    """What stands along the horizontal axis."""
    if table["index"].notna().any() and table["module"].nunique() == 1:
        return "index"
    return "step" if (table["module"] == "").all() else "place"


def _marks(shown: pd.DataFrame, x: str) -> list[Mark]:
    """Dots in the colour of their role, or of their recipe where there is one role; lines where a place has one dot."""
    color = "role" if shown["role"].nunique() > 1 else "recipe"
    other = "recipe" if color == "role" and shown["recipe"].nunique() > 1 else None
    low, high = ("low", "high") if shown["low"].notna().any() else (None, None)
    dots = [Point(x, "value", color, other, low=low, high=high)]
    doubled = shown.loc[shown.duplicated([x, "role", "recipe"]), "role"]
    single = shown[~shown["role"].isin(doubled)] if len(doubled) else None
    if x == "index" or (single is not None and single.empty):
        return [*dots]
    bands = [Band(x, "low", "high", color, single)] if low and other is None else []
    line = Line(x, "value", color, other, single)
    return [*bands, line, *(dots if x == "place" or len(shown) <= _MOST_DOTTED else [])]


def _vertical_ends(table: pd.DataFrame) -> tuple[float, float] | None:
    """Ends of the vertical axis for all steps; None where they span nothing."""
    bounds = table[["value", "low", "high"]].to_numpy()
    known = bounds[np.isfinite(bounds)]
    if known.size == 0 or known.min() == known.max():
        return None
    low, high = float(known.min()), float(known.max())
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
