"""Chart of one quantity for ``explore``: recorded values by module, without pooling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Band, Chart, Line, Mark, Point, Rule
from lorascope.plots.builders import ends
from lorascope.plots.run_groups import MIXTURES, Cohort, axis_label, mixture_sentences
from lorascope.schema.records import QUANTITIES

_VALUE = ["recipe", "kind", "step", "module", "place", "role", "index"]
UNSTEPPED = -1  # step of values stored without one, as in an adapter folder
_MOST_DOTTED = 60  # largest number of values over the steps at which each has its own dot


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Return mean and interval over the seeds of every value of one quantity; for a single run, the recorded values.

    Parameters
    ----------
    rows : DataFrame
        Rows from ``Cohort.label``, with ``place``.
    """
    return band(rows, _VALUE)


def at_step(table: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the rows of one step; ``UNSTEPPED`` selects those stored without a step."""
    return table[table["step"].fillna(UNSTEPPED) == step]


def values(cohort: Cohort, quantity: str, table: pd.DataFrame, step: int) -> Chart:
    """Plot values by layer and role at one step, of a single module by component, or of the whole run over the steps.

    Parameters
    ----------
    cohort : Cohort
        Runs that recorded the values.
    quantity : str
        Name of the quantity.
    table : DataFrame
        Values of all steps from ``cells``. They determine the vertical axis, so that it is the same at every step.
    step : int
        Step to show, as for ``at_step``.
    """
    cohort, entry = replace(cohort, name=quantity, needs=(quantity,)), QUANTITIES[quantity]
    x = _horizontal_axis(table)
    shown = table if x == "step" else at_step(table, step)
    when = "as stored" if step == UNSTEPPED else f"after step {step}"
    axes = {
        "index": Axis(label=entry.index.replace("_", " ")),
        "step": Axis(label="step"),
        "place": Axis(label="layer", order=list(table["place"].cat.remove_unused_categories().cat.categories)),
    }
    meta = cohort.meta
    caption = cohort.caption(f"{entry.label}: {entry.definition}.")
    return Chart(
        shown,
        [*_marks(shown, x), *([Rule(x=step)] if x == "step" and step != UNSTEPPED else [])],
        title=quantity.replace("_", " ") if x == "step" else f"{quantity.replace('_', ' ')}, {when}",
        x=axes[x],
        y=Axis(label=axis_label(quantity), limits=None if x == "step" else _vertical_ends(table)),
        caption=" ".join([caption, *mixture_sentences(meta.get(MIXTURES, {}))]),
        meta=meta,
    )


def _horizontal_axis(table: pd.DataFrame) -> str:
    """Return the column of the horizontal axis: component, step or layer."""
    if table["index"].notna().any() and table["module"].nunique() == 1:
        return "index"
    return "step" if (table["module"] == "").all() else "place"


def _marks(shown: pd.DataFrame, x: str) -> list[Mark]:
    """Return dots colored by role (by recipe if there is one role), joined by lines where every place has one dot."""
    color = "role" if shown["role"].nunique() > 1 else "recipe"
    other = "recipe" if color == "role" and shown["recipe"].nunique() > 1 else None
    low, high = ends(shown)
    dots = [Point(x, "value", color, other, low=low, high=high)]
    doubled = shown.loc[shown.duplicated([x, "role", "recipe"]), "role"]
    single = shown[~shown["role"].isin(doubled)] if len(doubled) else None
    if x == "index" or (single is not None and single.empty):
        return [*dots]
    bands = [Band(x, "low", "high", color, single)] if low and other is None else []
    line = Line(x, "value", color, other, single)
    return [*bands, line, *(dots if x == "place" or len(shown) <= _MOST_DOTTED else [])]


def _vertical_ends(table: pd.DataFrame) -> tuple[float, float] | None:
    """Return limits of the vertical axis for all steps; None if all values are equal or unknown."""
    bounds = table[["value", "low", "high"]].to_numpy()
    known = bounds[np.isfinite(bounds)]
    if known.size == 0 or known.min() == known.max():
        return None
    low, high = float(known.min()), float(known.max())
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
