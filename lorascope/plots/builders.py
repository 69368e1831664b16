"""Builders of charts that several figures share: lines over layers, steps or components, cells by role, and dots.

Their tables come from ``analysis.seed_intervals.seed_cells``: ``value`` with ``low`` and ``high``, or two seeds, and
``recipe``, the label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, set_side_by_side
from lorascope.charts.marks import Axis, Band, Bar, Heat, Line, Mark, Point, Rule
from lorascope.plots.run_groups import INTERVAL, Cohort
from lorascope.schema.module_roles import ROLES


def ends(cells: pd.DataFrame) -> dict[str, Any]:
    """Return the columns that a built chart shows as error bars; none if no recipe has enough seeds."""
    return {"low": "low", "high": "high"} if cells["low"].notna().any() else {}


def dots(
    cells: pd.DataFrame, x: str, y: str = "value", color: str | None = None, whiskers: bool = True, **settings: Any
) -> list[Mark]:
    """Return the marks of means over seeds: dots with their intervals, below them two seeds as hollow dots."""
    mean = Point(x, y, color, **settings)
    marks: list[Mark] = []
    if "smaller" in cells and cells["smaller"].notna().any():
        for column in ("smaller", "larger"):
            seed_x, seed_y = (column if name == "value" else name for name in (x, y))
            marks.append(replace(mean, x=seed_x, y=seed_y, hollow=True))
    if whiskers:
        mean = replace(mean, **ends(cells))
    return [*marks, mean]


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
    spread: bool = True,
    whiskers: bool = True,
    stretch: str | None = None,
    **settings: Any,
) -> Chart:
    """Build a chart with one line per recipe over the column ``x``, with a band and error bars for several seeds.

    ``labels`` are the axes or their labels, and ``color`` is the column that distinguishes the lines. Every value has a
    dot if ``points`` is set, and every dot an error bar if ``whiskers`` is set. Without ``spread``, only means are
    drawn. Lines join the rows with equal values of ``stretch``. ``marks`` are drawn on top.
    """
    along, up = map(_to_axis, labels)
    # With a single kind, an entry of the legend would distinguish nothing.
    dash = "kind" if "kind" in cells and cells["kind"].nunique() > 1 else None
    lines: list[Mark] = [Line(x, "value", color, dash, stretch)]
    if ends(cells) and spread:
        lines.insert(0, Band(x, "low", "high", color, stretch))
    if points and spread:
        lines += dots(cells, x, color=color, whiskers=whiskers)
    elif points:
        lines.append(Point(x, "value", color))
    return Chart(cells, [*lines, *marks], x=along, y=up, **settings)


def _to_axis(label: Axis | str) -> Axis:
    return Axis(label=label) if isinstance(label, str) else label


def course(cells: pd.DataFrame, y: Axis | str, *marks: Mark, **settings: Any) -> Chart:
    """Build a chart with one line per recipe over the steps; for the arguments see `curves`."""
    return curves(cells, "step", ("step", y), *marks, **settings)


def profile(cohort: Cohort, cells: pd.DataFrame, y: Axis | str, *marks: Mark, **settings: Any) -> Chart:
    """Build a chart over layers (per ``step``, if a column): lines over blocks, with gaps, dots of other modules."""
    order = used_places(cells)
    rows = cells[[column for column in ("step", "recipe", "kind") if column in cells]].drop_duplicates()
    # With other categories, the merge would lose the order of the layers.
    positions = pd.Categorical(order, cells["place"].cat.categories, ordered=True)
    # A missing layer gets a row without a value, where the line has a gap.
    full = rows.merge(pd.DataFrame({"place": positions}), how="cross").merge(cells, how="left")
    full = full.fillna({"n": 0}).astype({"n": "int64"})  # the gaps made n a float
    full = full.assign(stretch=block_stretches(full["place"]))
    axes = Axis(label="layer", order=order), y
    return curves(full, "place", axes, *marks, stretch="stretch", colors=cohort.labels, **settings)


def block_stretches(layers: pd.Series) -> pd.Series:
    """Return what the lines of a built chart join on the layer axis: the blocks of a stack, and no other module."""
    names = layers.astype("str")
    return names.mask(names.str.fullmatch(r"(.* )?\d+"), "blocks " + names.str.rpartition(" ")[0])


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


def metric_dots(cohort: Cohort, *sentences: str) -> Drawable:
    """Build a chart of the final test metric, best recipe first, and one of the differences from the first recipe."""
    scores = cohort.scores()
    cells = seed_cells(scores, ["recipe", "kind"])
    cells = cells.sort_values("value", ascending=cohort.lower_is_better, kind="stable")
    caption = cohort.caption(*filter(None, sentences), interval=f"bars: {INTERVAL}")
    y = Axis(order=list(cells["recipe"]), compact=True)
    x, title = Axis(label=cohort.metric), cohort.metric_title()
    metric = Chart(cells, dots(cells, "value", "recipe"), title=title, x=x, y=y, caption=caption)
    # The first recipe is the one that the caller compares the others with.
    base = cohort.labels[0]
    differences = paired_differences(cohort, scores, base)
    if differences.empty:
        return metric
    x, marks = Axis(label=f"{cohort.metric} − {base}"), [Rule(x=0), *dots(differences, "value", "recipe")]
    paired = Chart(differences, marks, title="Difference, paired by seed", x=x, y=y, caption=caption)
    return set_side_by_side(replace(metric, title="Recipes"), paired, title=title)


def paired_differences(cohort: Cohort, scores: pd.DataFrame, base: str) -> pd.DataFrame:
    """Tabulate the difference of every recipe of a built chart from ``base``, paired by seed, if their seeds are equal.

    Pairs of one seed share data order and initialization, so their difference varies less. Scores with a ``step`` are
    also paired by step.
    """
    seeds = {run.id: run.meta.seed for run in cohort.runs}
    steps = ["step"] if "step" in scores else []
    values = scores.assign(seed=scores["run"].astype("str").map(seeds)).set_index(["seed", *steps])
    by_label = {label: rows["value"].sort_index() for label, rows in values.groupby("recipe", sort=False)}
    tables = [pd.DataFrame(columns=["recipe", "value", *steps]).astype({"value": "float64"})]
    for label in cohort.labels:
        index = by_label[label].index
        if label != base and index.is_unique and index.equals(by_label[base].index):
            differences = (by_label[label] - by_label[base]).reset_index()
            tables.append(differences.assign(recipe=label))
    return seed_cells(pd.concat(tables[1:] or tables), ["recipe", *steps])


def stacked_bars(
    cells: pd.DataFrame, order: Sequence[str], x: str, colors: Sequence[str], *marks: Mark, **settings: Any
) -> Chart:
    """Build a chart with one lying bar per recipe, stacked of its parts."""
    stack, along = Bar("value", "recipe", "part", mode="stack"), Axis(label=x, limits=(0, None))
    return Chart(cells, [stack, *marks], x=along, y=Axis(order=order, compact=True), colors=colors, **settings)
