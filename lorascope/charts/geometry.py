"""Marks converted to shapes: positions, colors and styles that a renderer only has to draw.

A chart has the same shapes in the same order in every frame; a shape without rows in a frame is empty. Plotly's slider
replaces the contents of traces, but cannot add traces. A new kind of mark registers its shapes with :func:`build`; a
new kind of shape is a new case in each renderer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import singledispatch
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from lorascope.array_types import Float
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Band, Bar, Heat, Line, Mark, Point, Rule, Text
from lorascope.charts.scales import Colors, Ramp, Scale, to_floats
from lorascope.charts.theme import STYLES, Theme
from lorascope.files.printable import number_text

Numbers = Float[np.ndarray, "n"]
CROWD = 60.0  # area of all dots over that of the largest; with more of it each shrinks, so that the panel is readable
MINUS = "\N{MINUS SIGN}"  # as long as a plus, and the sign at the ticks of both renderers
CLUSTER = 0.8  # fraction of the distance between two positions that their bars fill


def drawn_number(number: float, spec: str) -> str:
    """Format a number for a figure: with `MINUS`, and without a sign if it rounds to zero."""
    return number_text(number, spec).replace("-", MINUS)


@dataclass(frozen=True, eq=False)
class Shape:
    """Geometry of a drawn shape; ``group`` is the legend entry that it belongs to."""

    def reach(self) -> tuple[list[Any], list[Any]]:
        """Return the outermost positions on x and on y, as numbers, arrays and None."""
        fields = vars(self)
        x, y = [fields.get("x")], list(map(fields.get, ("y", "low", "high")))
        if errors := fields.get("errors"):
            error_x, error_y = errors.reach()
            x, y = x + error_x, y + error_y
        return x, y


@dataclass(frozen=True, eq=False)
class Curve(Shape):
    """Geometry of a line; ``dash`` is plotly's name of its dash pattern, and a ``thin`` one joins dots."""

    x: Numbers
    y: Numbers
    color: str
    dash: str
    group: str
    thin: bool = False


@dataclass(frozen=True, eq=False)
class Area(Shape):
    """Geometry of an area between two lines."""

    x: Numbers
    low: Numbers
    high: Numbers
    color: str
    group: str


@dataclass(frozen=True, eq=False)
class Errors(Shape):
    """Geometry of error bars of dots or bars from ``low`` to ``high``, horizontal if ``lying``."""

    position: Numbers
    low: Numbers
    high: Numbers
    lying: bool
    colors: list[str]

    def reach(self) -> tuple[list[Any], list[Any]]:
        if self.lying:
            return [self.low, self.high], []
        return [], [self.low, self.high]


@dataclass(frozen=True, eq=False)
class Dots(Shape):
    """Geometry of dots; ``symbol`` is plotly's name of their shape, ``share`` their area relative to the largest."""

    x: Numbers
    y: Numbers
    colors: list[str]
    symbol: str
    share: Numbers | None
    errors: Errors | None
    group: str


@dataclass(frozen=True, eq=False)
class Bars(Shape):
    """Geometry of bars from ``base`` to ``top`` at ``position``, horizontal if ``lying``; ``hatch`` is "" for none."""

    position: Numbers
    base: Numbers
    top: Numbers
    width: float
    color: str
    hatch: str
    errors: Errors | None
    lying: bool
    group: str

    def reach(self) -> tuple[list[Any], list[Any]]:
        x, y = super().reach()
        x_ends, y_ends = [self.position - self.width / 2, self.position + self.width / 2], [self.base, self.top]
        if self.lying:
            x_ends, y_ends = y_ends, x_ends
        return x + x_ends, y + y_ends


@dataclass(frozen=True, eq=False)
class Cells(Shape):
    """Geometry of the cells of a heat map, NaN if there is no value.

    ``texts`` maps (row, column) to the number of a cell as text, ``words`` to the text that replaces it.
    """

    values: Float[np.ndarray, "rows columns"]
    mark: Heat
    ramp: Ramp
    texts: Mapping[tuple[int, ...], str]
    words: Mapping[tuple[int, ...], str]


@dataclass(frozen=True, eq=False)
class Ruler(Shape):
    """Geometry of a line across the panel at x or at y."""

    x: float | None
    y: float | None
    label: str


@dataclass(frozen=True, eq=False)
class Words(Shape):
    """Geometry of text at positions."""

    x: Numbers
    y: Numbers
    text: list[str]
    muted: bool


@dataclass(frozen=True, eq=False)
class Panel:
    """Geometry of a chart: its scales and colors, its ``number`` in the figure, and the color bar of its heat map."""

    number: int
    chart: Chart
    x: Scale
    y: Scale
    colors: Mapping[str, Colors]
    styles: Mapping[str, tuple[Any, ...]]
    theme: Theme
    ramp: Ramp | None

    def shapes(self, frame: Any = None) -> list[Shape]:
        """Return the shapes of one frame."""
        shapes: list[Shape] = []
        for mark in self.chart.marks:
            shapes += build(mark, self, frame)
        return shapes

    def rows(self, mark: Mark, frame: Any) -> pd.DataFrame:
        """Return the rows of a mark in one frame."""
        table, column = self.chart.table(mark), self.chart.frame
        if column is None or column not in table:
            return table
        return table[table[column] == frame]

    def order(self, mark: Mark, column: str) -> tuple[Any, ...]:
        """Return the values of a color or style column in the order of the legend."""
        if column in self.colors:
            return self.colors[column].categories
        present = set(self.chart.table(mark)[column])
        return tuple(value for value in self.styles[column] if value in present)

    def split(self, mark: Mark, frame: Any, *encodings: str) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
        """Yield the rows of a frame for each combination of values in the whole table: (rows, column -> value)."""
        rows = self.rows(mark, frame)
        columns = mark.distinct_columns(*encodings)
        if not columns:
            yield rows, {}
            return
        # The whole table determines the combinations, so that every frame has the same shapes.
        present = set(self.chart.table(mark)[columns].drop_duplicates().itertuples(index=False, name=None))
        for values in product(*(self.order(mark, column) for column in columns)):
            if values in present:
                key = dict(zip(columns, values, strict=True))
                is_picked = np.ones(len(rows), dtype=bool)
                for column, value in key.items():
                    is_picked &= (rows[column] == value).to_numpy(bool)
                yield rows[is_picked], key

    def color(self, mark: Mark, key: Mapping[str, Any]) -> str:
        """Return the color of one combination, gray for a muted mark."""
        if getattr(mark, "muted", False):
            return self.theme.gray
        column = mark.columns().get("color")
        if column is None:
            return self.theme.category(0, 1)
        return self.colors[column].of(key[column], self.theme)

    def style(self, mark: Mark, encoding: str, key: Mapping[str, Any]) -> str:
        """Return the name of its "dash" pattern, "shape" or "hatch", "" for other encodings.

        Without a separate column, they differ by color, so that a gray print is readable.
        """
        if encoding not in STYLES:
            return ""
        columns, index = mark.columns(), 0
        column, color = columns.get(encoding, ""), columns.get("color", "")
        if column in key:
            index = self.styles[column].index(key[column])
        elif not column and color in key and color not in mark.distinct_columns("x", "y"):
            index = self.colors[color].categories.index(key[color])
        style = STYLES[encoding][index % len(STYLES[encoding])]
        if isinstance(mark, Point):
            style = (mark.symbol or style) + "-open" * mark.hollow
        return style

    def positions(self, mark: Any, rows: pd.DataFrame) -> tuple[Numbers, Numbers]:
        """Return the positions of rows on x and y."""
        return self.x.to_positions(rows[mark.x]), self.y.to_positions(rows[mark.y])

    def errors(
        self, mark: Point | Bar, rows: pd.DataFrame, positions: Numbers, colors: list[str], base: Any = 0.0
    ) -> Errors | None:
        """Return the error bars of rows at ``positions``, if the mark has any; their ends are relative to ``base``."""
        if mark.low is None or mark.high is None:
            return None
        scale = self.x if self.chart.is_lying else self.y
        low, high = base + scale.to_positions(rows[mark.low]), base + scale.to_positions(rows[mark.high])
        return Errors(positions, low, high, self.chart.is_lying, colors)


def group(key: Mapping[str, Any]) -> str:
    """Return the legend group for the geometry of a combination, named after its color or, without one, its style."""
    for column, value in key.items():
        return f"{column}={value}"
    return ""


@singledispatch
def build(mark: Any, panel: Panel, frame: Any) -> Iterator[Shape]:
    """Build the geometry of a mark in one frame of a panel: yield its shapes."""
    raise TypeError(f"no shapes are registered for {type(mark).__name__}")


@build.register
def _(mark: Line, panel: Panel, frame: Any) -> Iterator[Curve]:
    for rows, key in panel.split(mark, frame, "color", "dash"):
        x, y = _split_stretches(mark, rows, *panel.positions(mark, rows))
        yield Curve(x, y, panel.color(mark, key), panel.style(mark, "dash", key), group(key), mark.muted)


@build.register
def _(mark: Band, panel: Panel, frame: Any) -> Iterator[Area]:
    for rows, key in panel.split(mark, frame, "color"):
        x, low, high = panel.x.to_positions(rows[mark.x]), *map(panel.y.to_positions, (rows[mark.low], rows[mark.high]))
        x, low, high = _split_stretches(mark, rows, x, low, high)
        yield Area(x, low, high, panel.color(mark, key), group(key))


def _split_stretches(mark: Line | Band, rows: pd.DataFrame, *positions: Numbers) -> list[Float[np.ndarray, "m"]]:
    """Return positions in the order of the first ones, with NaN, which is a gap, between the stretches of a mark."""
    order = np.argsort(positions[0], kind="stable")
    gaps: Any = []
    if mark.stretch is not None and len(rows):
        # Stretches may overlap, so each is drawn as a whole.
        number_of_stretch, _ = pd.factorize(rows[mark.stretch].to_numpy()[order])
        order = order[np.argsort(number_of_stretch, kind="stable")]
        stretches = rows[mark.stretch].to_numpy()[order]
        gaps = 1 + np.flatnonzero(stretches[1:] != stretches[:-1])
    return [np.insert(values[order], gaps, np.nan) for values in positions]


@build.register
def _(mark: Point, panel: Panel, frame: Any) -> Iterator[Dots]:
    column, table = mark.color, panel.chart.table(mark)
    encodings, shades = ["color", "shape"], None
    if column is not None and panel.colors[column].limits is not None:
        encodings, shades = ["shape"], panel.colors[column]  # dots of many colors are one shape
    for rows, key in panel.split(mark, frame, *encodings):
        if shades is not None:
            colors = [shades.of(value, panel.theme) for value in rows[column]]
        else:
            colors = [panel.color(mark, key)] * len(rows)
        share = None
        if mark.size is not None:
            # The fullest frame determines the sizes, so that dots do not change size between frames.
            areas = pd.Series(np.nan_to_num(to_floats(table[mark.size])))
            crowd = areas.sum() / CROWD
            if panel.chart.frame in table:
                crowd = areas.groupby(table[panel.chart.frame].to_numpy()).sum().max() / CROWD
            if panel.chart.square:  # its area is about a third of that of other panels
                crowd *= 3
            share = np.nan_to_num(to_floats(rows[mark.size])) / max(areas.max() or 1.0, crowd)
        x, y = panel.positions(mark, rows)
        errors = panel.errors(mark, rows, y if panel.chart.is_lying else x, colors)
        symbol = panel.style(mark, "shape", key)
        yield Dots(x, y, colors, symbol, share, errors, mark.label or group(key))


@build.register
def _(mark: Bar, panel: Panel, frame: Any) -> Iterator[Bars]:
    """Build bars side by side, or stacked: positive values upwards, negative ones downwards."""
    lying, groups = panel.chart.is_lying, list(panel.split(mark, frame, "color"))
    column, across = (mark.y, panel.y) if lying else (mark.x, panel.x)
    # The smallest distance between two positions leaves room for the bars at each.
    positions = np.unique(across.to_positions(panel.chart.table(mark)[column]))
    gaps = np.diff(positions[np.isfinite(positions)])
    width = CLUSTER
    if across.categories is None and gaps.size:
        width = CLUSTER * float(gaps.min())
    offsets: Numbers = np.zeros(len(groups))
    # Bars that are colored by their own position do not share it with others.
    if groups and mark.mode != "stack" and mark.color not in (None, column):
        width /= len(groups)
        offsets = (np.arange(len(groups)) - (len(groups) - 1) / 2) * width
    # Positive and negative pieces of a stack start at zero separately.
    reached: dict[tuple[float, bool], float] = {}
    for offset, (rows, key) in zip(offsets, groups, strict=True):
        centers, length = panel.positions(mark, rows)
        if lying:
            centers, length = length, centers
        base = np.zeros(len(rows))
        if mark.mode == "stack":
            for index, (center, piece) in enumerate(zip(centers, np.nan_to_num(length), strict=True)):
                base[index] = reached.get((center, piece < 0), 0.0)
                reached[center, piece < 0] = base[index] + piece
        centers = centers + offset
        errors = panel.errors(mark, rows, centers, [panel.theme.ink] * len(rows), base)
        color, hatch = panel.color(mark, key), panel.style(mark, "hatch", key)
        yield Bars(centers, base, base + length, width, color, hatch, errors, lying, group(key))


@build.register
def _(mark: Heat, panel: Panel, frame: Any) -> Iterator[Cells]:
    assert panel.ramp is not None
    rows = panel.rows(mark, frame)
    values = np.full((len(panel.y.names), len(panel.x.names)), np.nan)
    x, y = np.array(panel.positions(mark, rows)).astype(int)
    values[y, x] = to_floats(rows[mark.value])
    words: dict[tuple[int, ...], str] = {}
    if mark.words is not None:
        cells = zip(y.tolist(), x.tolist(), strict=True)
        words = dict(zip(cells, map(str, rows[mark.words]), strict=True))
    spec = mark.text or ".4g"
    texts = {}
    for cell, value in np.ndenumerate(values):
        if np.isfinite(value):
            texts[cell] = drawn_number(value, spec)
    yield Cells(values, mark, panel.ramp, texts, words)


@build.register
def _(mark: Rule, panel: Panel, frame: Any) -> Iterator[Ruler]:
    if mark.x is None:
        yield Ruler(None, panel.y.locate(mark.y), mark.label)
    else:
        yield Ruler(panel.x.locate(mark.x), None, mark.label)


@build.register
def _(mark: Text, panel: Panel, frame: Any) -> Iterator[Words]:
    rows = panel.rows(mark, frame)
    yield Words(*panel.positions(mark, rows), rows[mark.text].astype(str).tolist(), mark.muted)
