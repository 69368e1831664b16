"""Builders of charts that several figures share: lines over layers, steps or components, cells by role, and bars.

Their tables come from ``analysis.seed_intervals.band``: ``value`` with ``low`` and ``high``, and ``recipe``, the label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Band, Bar, Heat, Line, Mark, Point, Text
from lorascope.plots.run_groups import INTERVAL, Cohort
from lorascope.schema.module_roles import ROLES


def ends(cells: pd.DataFrame) -> dict[str, Any]:
    """Return the columns of ``band`` that a built chart shows as error bars; none if no recipe has several seeds."""
    return {"low": "low", "high": "high"} if cells["low"].notna().any() else {}


def used_places(cells: pd.DataFrame) -> list[str]:
    """Return the positions to build a chart's layer axis from: those that occur, in their order."""
    return list(cells["place"].cat.remove_unused_categories().cat.categories)


def used_roles(cells: pd.DataFrame) -> list[str]:
    """Return the roles to build a chart's role axis from: those that occur, in their order."""
    used = set(cells["role"])
    return [role for role in ROLES if role in used]


def ticks_at(values: Iterable[float]) -> dict[float, str]:
    """Return the ticks to build a chart's axis with: one at each of these values."""
    return {value: f"{value:g}" for value in sorted(set(values))}


def mean_over_modules(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Average the values of a chart to build over the modules of every run, for each step and value of ``columns``."""
    keys = [key for key in ("run", "recipe", "kind", *columns, "step") if key in rows]
    return rows.groupby(keys, observed=True)["value"].mean().reset_index()


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
    """Build a chart with one line per recipe over the column ``x``, with a band and error bars for several seeds.

    ``labels`` are the axes or their labels, and ``color`` is the column that distinguishes the lines. Every value has a
    dot if ``points`` is set, and every dot an error bar if ``whiskers`` is set. ``marks`` are drawn on top.
    """
    along, up = map(_to_axis, labels)
    # With a single kind, an entry of the legend would distinguish nothing.
    dash = "kind" if "kind" in cells and cells["kind"].nunique() > 1 else None
    lines: list[Mark] = [Line(x, "value", color, dash)]
    if ends(cells):
        lines.insert(0, Band(x, "low", "high", color))
    if points:
        lines.append(Point(x, "value", color, **(ends(cells) if whiskers else {})))
    return Chart(cells, [*lines, *marks], x=along, y=up, **settings)


def _to_axis(label: Axis | str) -> Axis:
    return Axis(label=label) if isinstance(label, str) else label


def course(cells: pd.DataFrame, y: Axis | str, **settings: Any) -> Chart:
    """Build a chart with one line per recipe over the steps; for the arguments see `curves`."""
    return curves(cells, "step", ("step", y), **settings)


def profile(cohort: Cohort, cells: pd.DataFrame, y: Axis | str, **settings: Any) -> Chart:
    """Build a chart with one line per recipe over layers (per ``step``, if a column), with gaps for missing records."""
    order = used_places(cells)
    rows = cells[[column for column in ("step", "recipe", "kind") if column in cells]].drop_duplicates()
    # With other categories, the merge would lose the order of the layers.
    positions = pd.Categorical(order, cells["place"].cat.categories, ordered=True)
    # A missing layer gets a row without a value, where the line has a gap.
    full = rows.merge(pd.DataFrame({"place": positions}), how="cross").merge(cells, how="left")
    full = full.fillna({"n": 0}).astype({"n": "int64"})  # the gaps made n a float
    return curves(full, "place", (Axis(label="layer", order=order), y), colors=cohort.labels, **settings)


def heat_by_role(
    cells: pd.DataFrame,
    labels: Iterable[str],
    mark: Callable[[pd.DataFrame], Heat],
    along: str,
    caption: str,
    frame: str | None = None,
) -> list[Chart]:
    """Build charts of cells by layer and role, one per recipe with the mark of its rows, all with the same axes."""
    x, y = Axis(label=along, order=used_places(cells)), Axis(order=used_roles(cells))
    charts = []
    for label in labels:
        rows = cells[cells["recipe"] == label]
        charts.append(Chart(rows, [mark(rows)], title=label, x=x, y=y, caption=caption, frame=frame))
    return charts


def pair_heat(cells: pd.DataFrame, mark: Heat, order: Sequence[str], *marks: Mark, **settings: Any) -> Chart:
    """Build a chart with a square of cells, one per pair of the labels in ``order``."""
    return Chart(cells, [mark, *marks], x=Axis(order=order), y=Axis(order=order), **settings)


def bars(
    cells: pd.DataFrame,
    x: str,
    axes: tuple[Axis, Axis | str],
    *marks: Mark,
    color: str | None = None,
    **settings: Any,
) -> Chart:
    """Build a chart of bars from zero with their intervals."""
    along, up = axes
    if isinstance(up, str):
        up = Axis(label=up, limits=(0, None))
    return Chart(cells, [Bar(x, "value", color, **ends(cells)), *marks], x=along, y=up, **settings)


def metric_bars(cohort: Cohort, start: float, x: str, sentences: Sequence[str], title: str) -> Chart:
    """Build a bar chart of the final test metric, one bar per recipe with interval and number, from ``start``."""
    cells = band(cohort.scores(), ["recipe", "kind"])
    top = cells["high"].fillna(cells["value"])
    # The numbers are above the error bars, with a little room.
    cells = cells.assign(words=cells["value"].map("{:#.3g}".format), above=top + 0.04 * (top.max() - start))
    return bars(
        cells,
        "recipe",
        (Axis(label=x, order=cohort.labels), Axis(label=cohort.metric, limits=(start, None))),
        Text("recipe", "above", "words"),
        title=title,
        caption=cohort.caption(*filter(None, sentences), interval=f"bars: {INTERVAL}"),
    )


def stacked_bars(
    cells: pd.DataFrame, order: Sequence[str], x: str, colors: Sequence[str], *marks: Mark, **settings: Any
) -> Chart:
    """Build a chart with one lying bar per recipe, stacked of its parts."""
    stack, along = Bar("value", "recipe", "part", mode="stack"), Axis(label=x, limits=(0, None))
    return Chart(cells, [stack, *marks], x=along, y=Axis(order=order), colors=colors, **settings)
