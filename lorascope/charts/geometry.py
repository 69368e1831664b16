"""Marks converted to shapes: positions, colors and styles that a renderer only has to draw.

A chart has the same shapes in the same order in every frame; a shape without rows in a frame is empty. Plotly's slider
replaces the contents of traces, but cannot add traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.charts.chart import Band, Bar, Chart, Heat, Line, Mark, Point, Rule, Span, Text
from lorascope.charts.scales import Colors, Scale, to_floats
from lorascope.charts.theme import Theme

Numbers = Float[np.ndarray, "n"]
CROWD = 300  # dots per frame; with more of them each dot shrinks, so that they do not cover the panel
CLUSTER = 0.8  # fraction of the distance between two positions that their bars fill


@dataclass(frozen=True)
class Curve:
    """A line; ``dash`` is the index of a dash pattern, ``group`` the legend entry of the line."""

    x: Float[np.ndarray, "n"]
    y: Float[np.ndarray, "n"]
    color: str
    dash: int
    group: str


@dataclass(frozen=True)
class Area:
    """Area between two lines."""

    x: Float[np.ndarray, "n"]
    low: Float[np.ndarray, "n"]
    high: Float[np.ndarray, "n"]
    color: str
    group: str


@dataclass(frozen=True)
class Dots:
    """Dots; ``share`` is their area relative to the largest, ``low`` and ``high`` are the ends of error bars."""

    x: Float[np.ndarray, "n"]
    y: Float[np.ndarray, "n"]
    colors: list[str]
    shape: int
    share: Float[np.ndarray, "n"] | None
    low: Float[np.ndarray, "n"] | None
    high: Float[np.ndarray, "n"] | None
    lying: bool
    group: str


@dataclass(frozen=True)
class Bars:
    """Bars from ``base`` to ``top`` at ``place``, horizontal if ``lying``."""

    place: Float[np.ndarray, "n"]
    base: Float[np.ndarray, "n"]
    top: Float[np.ndarray, "n"]
    width: float
    color: str
    low: Float[np.ndarray, "n"] | None
    high: Float[np.ndarray, "n"] | None
    lying: bool
    group: str


@dataclass(frozen=True)
class Cells:
    """Cells of a heat map, NaN if there is no value; ``words`` maps (row, column) to the text of a cell."""

    values: Float[np.ndarray, "rows columns"]
    mark: Heat
    words: Mapping[tuple[int, ...], str]


@dataclass(frozen=True)
class Ruler:
    """Line across the panel at x or at y."""

    x: float | None
    y: float | None
    label: str


@dataclass(frozen=True)
class Shade:
    """Shaded interval of x."""

    x0: float
    x1: float
    label: str


@dataclass(frozen=True)
class Words:
    """Text at positions."""

    x: Float[np.ndarray, "n"]
    y: Float[np.ndarray, "n"]
    text: list[str]


Shape = Curve | Area | Dots | Bars | Cells | Ruler | Shade | Words


@dataclass(frozen=True)
class Panel:
    """A chart with its scales and colors."""

    chart: Chart
    x: Scale
    y: Scale
    colors: Mapping[str, Colors]
    styles: Mapping[str, tuple[Any, ...]]
    theme: Theme

    def shapes(self, frame: Any = None) -> list[Shape]:
        """Return the shapes of one frame."""
        return [shape for mark in self.chart.marks for shape in BUILDERS[type(mark)](self, mark, frame)]

    def rows(self, mark: Mark, frame: Any) -> pd.DataFrame:
        """Return the rows of a mark in one frame."""
        table, column = self.chart.table(mark), self.chart.frame
        return table if column is None or column not in table else table[table[column] == frame]

    def order(self, mark: Mark, column: str) -> tuple[Any, ...]:
        """Return the values of a color or style column in the order of the legend."""
        if column in self.colors:
            return self.colors[column].categories
        here = set(self.chart.table(mark)[column])
        return tuple(value for value in self.styles[column] if value in here)

    def split(self, mark: Mark, frame: Any, *encodings: str) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
        """Yield the rows of a frame for each combination of values in the whole table: (rows, column -> value)."""
        rows = self.rows(mark, frame)
        used = mark.columns()
        columns = list(dict.fromkeys(used[encoding] for encoding in encodings if encoding in used))
        if not columns:
            yield rows, {}
            return
        orders = {column: self.order(mark, column) for column in columns}
        # The whole table determines the combinations, so that every frame has the same shapes.
        combinations = self.chart.table(mark)[columns].drop_duplicates().itertuples(index=False, name=None)
        keys = [dict(zip(columns, values, strict=True)) for values in combinations]
        for key in sorted(keys, key=lambda key: [orders[column].index(value) for column, value in key.items()]):
            picked = np.logical_and.reduce([(rows[column] == value).to_numpy(bool) for column, value in key.items()])
            yield rows[picked], key

    def color(self, mark: Mark, key: Mapping[str, Any]) -> str:
        """Return the color of one combination."""
        column = mark.columns().get("color")
        return self.theme.category(0, 1) if column is None else self.colors[column].of(key[column], self.theme)

    def style(self, mark: Mark, encoding: str, key: Mapping[str, Any]) -> int:
        """Return the index of its dash pattern or shape."""
        column = mark.columns().get(encoding)
        return 0 if column is None else self.styles[column].index(key[column])

    def ends(self, mark: Point | Bar, rows: pd.DataFrame) -> tuple[Numbers | None, Numbers | None]:
        """Return the lower and upper ends of the error bars."""
        if mark.low is None or mark.high is None:
            return None, None
        scale = self.x if self.chart.is_lying else self.y
        return scale.place(rows[mark.low]), scale.place(rows[mark.high])


def group(key: Mapping[str, Any]) -> str:
    """Return the legend group of a combination, named after its color or, without one, its style."""
    return next((f"{column}={value}" for column, value in key.items()), "")


def _build_curves(panel: Panel, mark: Line, frame: Any) -> Iterator[Curve]:
    for rows, key in panel.split(mark, frame, "color", "dash"):
        x, y = panel.x.place(rows[mark.x]), panel.y.place(rows[mark.y])
        order = np.argsort(x, kind="stable")
        yield Curve(x[order], y[order], panel.color(mark, key), panel.style(mark, "dash", key), group(key))


def _build_areas(panel: Panel, mark: Band, frame: Any) -> Iterator[Area]:
    for rows, key in panel.split(mark, frame, "color"):
        x = panel.x.place(rows[mark.x])
        order = np.argsort(x, kind="stable")
        low, high = panel.y.place(rows[mark.low]), panel.y.place(rows[mark.high])
        yield Area(x[order], low[order], high[order], panel.color(mark, key), group(key))


def _build_dots(panel: Panel, mark: Point, frame: Any) -> Iterator[Dots]:
    column = mark.color
    shaded = column is not None and panel.colors[column].limits is not None
    for rows, key in panel.split(mark, frame, "shape") if shaded else panel.split(mark, frame, "color", "shape"):
        colors = (
            [panel.colors[column].of(value, panel.theme) for value in rows[column]]
            if shaded and column is not None
            else [panel.color(mark, key)] * len(rows)
        )
        share = None
        if mark.size is not None:
            whole = panel.chart.table(mark)
            # The largest frame determines the sizes, so that dots do not change size between frames.
            most = len(whole) if panel.chart.frame not in whole else whole[panel.chart.frame].value_counts().max()
            largest = np.nanmax(to_floats(whole[mark.size]), initial=0.0) or 1.0
            share = np.nan_to_num(to_floats(rows[mark.size])) / largest * min(1.0, CROWD / most)
        x, y = panel.x.place(rows[mark.x]), panel.y.place(rows[mark.y])
        low, high = panel.ends(mark, rows)
        yield Dots(x, y, colors, panel.style(mark, "shape", key), share, low, high, panel.chart.is_lying, group(key))


def _build_bars(panel: Panel, mark: Bar, frame: Any) -> Iterator[Bars]:
    """Build bars side by side, or stacked: positive values upwards, negative ones downwards."""
    column, value = (mark.y, mark.x) if panel.chart.is_lying else (mark.x, mark.y)
    across, along = (panel.y, panel.x) if panel.chart.is_lying else (panel.x, panel.y)
    whole = panel.chart.table(mark)
    room = CLUSTER * _pitch(across, whole[column])
    groups = list(panel.split(mark, frame, "color"))
    # Bars that are colored by their own position do not share it with others.
    whole_slot = mark.mode == "stack" or mark.color in (None, column)
    width = room if whole_slot else room / max(len(groups), 1)
    # Positive and negative pieces of a stack start at zero separately.
    reached: dict[tuple[float, bool], float] = {}
    for slot, (rows, key) in enumerate(groups):
        place, length = across.place(rows[column]), along.place(rows[value])
        base = np.zeros(len(rows))
        if mark.mode == "stack":
            for index, (spot, piece) in enumerate(zip(place, np.nan_to_num(length), strict=True)):
                base[index] = reached.get((spot, piece < 0), 0.0)
                reached[spot, piece < 0] = base[index] + piece
        offset = 0.0 if whole_slot else (slot - (len(groups) - 1) / 2) * width
        low, high = (None if end is None else base + end for end in panel.ends(mark, rows))
        color = panel.color(mark, key)
        yield Bars(place + offset, base, base + length, width, color, low, high, panel.chart.is_lying, group(key))


def _pitch(scale: Scale, values: pd.Series) -> float:
    """Return the smallest distance between two positions."""
    places = np.unique(scale.place(values))
    gaps = np.diff(places[np.isfinite(places)])
    return 1.0 if scale.categories is not None or not gaps.size else float(gaps.min())


def _build_cells(panel: Panel, mark: Heat, frame: Any) -> Iterator[Cells]:
    rows = panel.rows(mark, frame)
    values = np.full((len(panel.y.categories or ()), len(panel.x.categories or ())), np.nan)
    places = panel.y.place(rows[mark.y]).astype(int), panel.x.place(rows[mark.x]).astype(int)
    values[places] = to_floats(rows[mark.value])
    if mark.log:
        values[values <= 0] = np.nan
    told = [] if mark.words is None else zip(*(place.tolist() for place in places), rows[mark.words], strict=True)
    yield Cells(values, mark, {(row, column): str(text) for row, column, text in told})


def _build_ruler(panel: Panel, mark: Rule, frame: Any) -> Iterator[Ruler]:
    x = None if mark.x is None else panel.x.locate(mark.x)
    yield Ruler(x, None if mark.y is None else panel.y.locate(mark.y), mark.label)


def _build_shade(panel: Panel, mark: Span, frame: Any) -> Iterator[Shade]:
    yield Shade(panel.x.locate(mark.x0), panel.x.locate(mark.x1), mark.label)


def _build_words(panel: Panel, mark: Text, frame: Any) -> Iterator[Words]:
    rows = panel.rows(mark, frame)
    yield Words(panel.x.place(rows[mark.x]), panel.y.place(rows[mark.y]), rows[mark.text].astype(str).tolist())


BUILDERS: dict[type[Mark], Callable[[Panel, Any, Any], Iterator[Shape]]] = {
    Line: _build_curves,
    Band: _build_areas,
    Point: _build_dots,
    Bar: _build_bars,
    Heat: _build_cells,
    Rule: _build_ruler,
    Span: _build_shade,
    Text: _build_words,
}
