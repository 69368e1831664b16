"""Builders of charts that several figures share: lines over layers, steps or components, cells by role, and bars.

Their tables come from ``analysis.seed_intervals.band``: ``value`` with ``low`` and ``high``, and ``recipe``, the label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Band, Bar, Chart, Heat, Line, Mark, Point, Text
from lorascope.plots.run_groups import INTERVAL, Cohort
from lorascope.schema.module_roles import ROLES


def ends(cells: pd.DataFrame) -> tuple[str | None, str | None]:
    """Return the columns of ``band`` with the ends of the interval; None if no recipe has several seeds."""
    return ("low", "high") if cells["low"].notna().any() else (None, None)


def used_places(cells: pd.DataFrame) -> list[str]:
    """Return the positions on the layer axis that occur, in their order."""
    used = set(cells["place"])
    return [name for name in cells["place"].cat.categories if name in used]


def used_roles(cells: pd.DataFrame) -> list[str]:
    """Return the roles that occur, in their order."""
    used = set(cells["role"])
    return [role for role in ROLES if role in used]


def mean_over_modules(rows: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Average the values of every run over its modules, for each step and ``by``."""
    keys = [key for key in ("run", "recipe", "kind", *by, "step") if key in rows]
    return rows.groupby(keys, observed=True)["value"].mean().reset_index()


def lines(
    cells: pd.DataFrame, x: str, color: str = "recipe", *, points: bool = True, whiskers: bool = True
) -> list[Mark]:
    """Return the marks of one line per recipe, with a band, and error bars at the points, for several seeds."""
    low, high = ends(cells)
    dash = "kind" if "kind" in cells and cells["kind"].nunique() > 1 else None
    bands = [Band(x, low, high, color)] if low and high else []
    dots = Point(x, "value", color, low=low, high=high) if whiskers else Point(x, "value", color)
    return [*bands, Line(x, "value", color, dash), *([dots] if points else [])]


def curves(
    cells: pd.DataFrame,
    x: str,
    labels: tuple[Axis | str, Axis | str],
    *marks: Mark,
    color: str = "recipe",
    points: bool = True,
    whiskers: bool = True,
    **settings: Any,
) -> Chart:
    """Plot one line per recipe over the column ``x``.

    Parameters
    ----------
    cells : DataFrame
        Table from ``band``.
    x : str
        Column of the horizontal axis.
    labels : (Axis or str, Axis or str)
        Axes, or their labels.
    *marks : Mark
        Further marks, on top.
    color : str
        Column that distinguishes the lines.
    points, whiskers : bool
        Whether every value has a dot, and whether dots have error bars.
    **settings
        Further arguments of `Chart`.
    """
    along, up = (Axis(label=label) if isinstance(label, str) else label for label in labels)
    drawn = lines(cells, x, color, points=points, whiskers=whiskers)
    return Chart(cells, [*drawn, *marks], x=along, y=up, **settings)


def course(cells: pd.DataFrame, y: Axis | str, *marks: Mark, **settings: Any) -> Chart:
    """Plot one line per recipe over the steps; the arguments are those of `curves`."""
    return curves(cells, "step", ("step", y), *marks, **settings)


def profile(cohort: Cohort, cells: pd.DataFrame, y: Axis | str, **settings: Any) -> Chart:
    """Plot one line per recipe over the layers, with gaps where a recipe has no record.

    Parameters
    ----------
    cohort : Cohort
        Runs of the figure.
    cells : DataFrame
        Table from ``band`` by ``recipe``, ``kind`` and ``place``, and by ``step`` if it is the frame.
    y : Axis or str
        Vertical axis, or its label.
    **settings
        Further arguments of `Chart`.
    """
    order = used_places(cells)
    rows = cells[[column for column in ("step", "recipe", "kind") if column in cells]].drop_duplicates()
    places = pd.Categorical(order, cells["place"].cat.categories, ordered=True)
    full = rows.merge(pd.DataFrame({"place": places}), how="cross").merge(cells, how="left")
    full = full.fillna({"n": 0}).astype({"n": "int64"})
    return curves(full, "place", (Axis(label="layer", order=order), y), colors=cohort.labels, **settings)


def heat_by_role(
    cells: pd.DataFrame,
    labels: Iterable[str],
    mark: Callable[[pd.DataFrame], Heat],
    along: str,
    caption: str,
    frame: str | None = None,
) -> list[Chart]:
    """Plot cells by layer and role, one panel per recipe, all with the same axes.

    Parameters
    ----------
    cells : DataFrame
        Table with ``recipe``, ``place`` and ``role``.
    labels : iterable of str
        Recipes in the order of the panels.
    mark : callable
        Returns the mark for the rows of one recipe.
    along : str
        Label of the horizontal axis.
    caption : str
        Caption of every panel.
    frame : str, optional
        Column of the slider.
    """
    x, y = Axis(label=along, order=used_places(cells)), Axis(order=used_roles(cells))
    parts = [(label, cells[cells["recipe"] == label]) for label in labels]
    return [Chart(own, [mark(own)], title=label, x=x, y=y, caption=caption, frame=frame) for label, own in parts]


def pair_heat(cells: pd.DataFrame, mark: Heat, order: Sequence[str], *marks: Mark, **settings: Any) -> Chart:
    """Plot a square of cells, one per pair of the labels in ``order``."""
    return Chart(cells, [mark, *marks], x=Axis(order=order), y=Axis(order=order), **settings)


def metric_bars(cohort: Cohort, start: float, x: str, sentences: Sequence[str], title: str) -> Chart:
    """Plot the final test metric, one bar per recipe, with its interval and its number above.

    Parameters
    ----------
    cohort : Cohort
        Runs of the figure.
    start : float
        Lower end of the metric axis.
    x, title : str
        Label of the horizontal axis, and title.
    sentences : sequence of str
        Sentences of the caption.
    """
    cells = band(cohort.scores(), ["recipe", "kind"])
    top = cells["high"].fillna(cells["value"])
    cells = cells.assign(words=cells["value"].map("{:#.3g}".format), above=top + 0.04 * (top.max() - start))
    low, high = ends(cells)
    return Chart(
        cells,
        [Bar("recipe", "value", low=low, high=high), Text("recipe", "above", "words")],
        title=title,
        x=Axis(label=x, order=cohort.labels),
        y=Axis(label=cohort.metric, limits=(start, None)),
        caption=cohort.caption(*sentences, interval=f"bars: {INTERVAL}"),
    )


def stacked_bars(
    cells: pd.DataFrame, order: Sequence[str], x: str, colors: Sequence[str], *marks: Mark, **settings: Any
) -> Chart:
    """Plot one lying bar per recipe, stacked of its parts."""
    drawn = [Bar("value", "recipe", "part", mode="stack"), *marks]
    return Chart(cells, drawn, x=Axis(label=x, limits=(0, None)), y=Axis(order=order), colors=colors, **settings)
