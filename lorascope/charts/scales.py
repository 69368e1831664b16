"""Mapping from values to positions and colors, before anything is drawn.

Categories have the positions 0, 1, 2, ... in both renderers, so that lines, bars, cells and text share one axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas.api.types import is_integer_dtype

from lorascope.array_types import Bool, Float
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Mark, is_numeric
from lorascope.charts.text_wrapping import GLYPH
from lorascope.charts.theme import PALETTE_SIZE, Theme, mix_colors
from lorascope.files.printable import short_name

_LARGEST = 1e200
_BULK = 0.95  # smallest fraction of values that color limits without outliers contain

Limits = tuple[float, float]


class Ticks(NamedTuple):
    """Ticks of a scale: positions and names; ``turned`` if the names only fit vertically."""

    positions: list[float]
    names: list[str]
    turned: bool


@dataclass(frozen=True)
class Scale:
    """Scale of one axis of one panel.

    ``categories`` is None for a numeric axis; ``is_integer`` restricts its ticks to integers. ``limits`` are values on
    a numeric axis and positions on a categorical one, left or bottom end first.
    """

    axis: Axis
    categories: tuple[Any, ...] | None
    is_integer: bool = False
    limits: Limits = (0.0, 1.0)

    @property
    def log(self) -> bool:
        """Whether the axis is numeric and logarithmic."""
        return self.axis.log and self.categories is None

    @property
    def names(self) -> list[str]:
        """Names of the categories."""
        return list(map(short_name, self.categories or ()))

    @property
    def is_wordy(self) -> bool:
        """Whether most categories are words, each of which should be readable, and not evenly spaced numbers."""
        return 2 * int(_are_counted(self.names).sum()) < len(self.names)

    def height(self, usual: float, rows: float, max_height: float, min_height: float) -> float:
        """Return the height of a panel with this y axis: ``rows`` for its names if these are words or fit."""
        if self.categories is None:
            return usual
        if not self.is_wordy:
            rows = min(rows, max_height)
        if self.axis.compact:
            return rows
        return max(rows, min_height)

    def to_positions(self, values: pd.Series) -> Float[np.ndarray, "n"]:
        """Return positions of values; NaN for values without one (missing, infinite, or <= 0 on a log axis)."""
        if self.categories is None:
            numbers = to_floats(values)
            if self.log:
                numbers = np.where(numbers > 0, numbers, np.nan)
            return numbers
        if is_numeric(values) and is_numeric(pd.Series(self.categories)):
            # A number between numeric categories has a position, for example that of a rule at step 15.
            tick_values = np.asarray(self.categories, dtype=float)
            order = np.argsort(tick_values)
            left, right = -0.5, len(tick_values) - 0.5
            if order[0] > order[-1]:  # the categories descend
                left, right = right, left
            return np.interp(to_floats(values), tick_values[order], order.astype(float), left=left, right=right)
        position_of = {category: position for position, category in enumerate(self.categories)}
        return np.array([position_of.get(value, np.nan) for value in values], dtype=float)

    def locate(self, value: Any) -> float:
        """Return the position of one value, for a rule."""
        position = float(self.to_positions(pd.Series([value]))[0])
        if np.isnan(position):
            allowed = "a finite number"
            if self.log:
                allowed += " > 0"
            if self.categories is not None:
                allowed = f"one of {', '.join(map(str, self.categories))}"
            raise ValueError(f"position on axis {self.axis.label!r} must be {allowed}, got {value!r}")
        return position

    def nearest_names(self, positions: Float[np.ndarray, "n"]) -> list[str]:
        """Return the names of the categories nearest to these positions, "" if there is none."""
        names = dict(enumerate(self.names))
        # NaN equals no key, and an integral float equals the key of its integer.
        return [names.get(position, "") for position in np.rint(positions)]

    def ticks(self, room: float, size: float, across: bool) -> Ticks | None:
        """Choose tick positions and names for an axis of length ``room``, None on an axis of numbers.

        ``room`` is in the unit of the font size ``size``. Names are ``across``, if they are perpendicular to the axis.
        """
        if self.axis.ticks is not None:
            positions = self.to_positions(pd.Series(list(self.axis.ticks)))
            return Ticks(list(positions), list(self.axis.ticks.values()), False)
        if self.categories is None:
            return None
        names = self.names
        widths = np.array([len(name) + 1 for name in names]) * GLYPH * size
        cell = max(room, size) / max(len(names), 1)  # names on the other axis may leave no room
        # Two neighbors overlap if they are wider than two cells together.
        turned = not across and self.is_wordy and bool((widths[:-1] + widths[1:] > 2 * cell).any())
        lengths = widths / cell
        if across or turned:
            lengths[:] = 1.25 * size / cell  # across its axis, a name takes the height of a line
        candidates = _candidate_names(names, lengths)
        indices = _fitting_names(candidates, lengths)
        if not across and not turned and len(indices) < len(candidates):
            # Words cover the numbers next to them, such as "embed" the first layer. Numbers stay upright.
            turned = True
            lengths = np.where(_are_counted(names), lengths, 1.25 * size / cell)
            indices = _fitting_names(_candidate_names(names, lengths), lengths)
        return Ticks(list(map(float, indices)), [names[index] for index in indices], turned)


def is_digits(name: str) -> bool:
    return name.lstrip("-").replace(".", "", 1).isdigit()


def _are_counted(names: Sequence[str]) -> Bool[np.ndarray, "n"]:
    """Return which names are numbers, if these are evenly spaced, so that some of them imply the others."""
    is_number = np.array(list(map(is_digits, names)), dtype=bool)
    steps = np.diff(np.array(names)[is_number].astype(float))
    return is_number & np.allclose(steps, steps[:1])


def _candidate_names(names: Sequence[str], lengths: Float[np.ndarray, "n"]) -> list[int]:
    """Return indices of names to write, of ``lengths`` in cells: first words, then numbers at round steps."""
    is_number = _are_counted(names)
    words, numbers = np.flatnonzero(~is_number).tolist(), np.flatnonzero(is_number).tolist()
    if not numbers:
        if (lengths[:-1] + lengths[1:] <= 2).all():
            return words
        return words[:: int(np.ceil(lengths.max()))]
    longest = lengths[is_number].max()
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step >= longest), 1000)
    return words + numbers[::step]


def _fitting_names(candidates: Sequence[int], lengths: Float[np.ndarray, "n"]) -> list[int]:
    """Return the candidates that overlap none of those before them, in the order of the axis."""
    written: list[int] = []
    for index in candidates:
        if all(abs(index - other) >= (lengths[index] + lengths[other]) / 2 for other in written):
            written.append(index)
    return sorted(written)


@dataclass(frozen=True)
class Colors:
    """Color scale of one column: by category or, if ``limits`` are set, by number between them."""

    label: str
    categories: tuple[Any, ...]
    limits: Limits | None = None

    def of(self, value: Any, theme: Theme) -> str:
        """Return the color of a value."""
        if self.limits is None:
            color = theme.category(self.categories.index(value), len(self.categories))
            return theme.by_label.get(str(value), color)
        low, high = self.limits
        return theme.color_at((float(value) - low) / (high - low))


@dataclass(frozen=True)
class Ramp:
    """Color bar of a scale; ``number`` is its place in the figure, ``views`` the indices of the panels with it.

    ``beyond`` is "min", "max" or "both" if values are outside the limits there.
    """

    number: int
    label: str
    colors: list[str]
    limits: Limits
    views: list[int]
    beyond: str = "neither"

    def color_of(self, value: float) -> str:
        """Return the color of a value, at the nearest end if it is outside the limits."""
        low, high = self.limits
        return mix_colors(self.colors, (value - low) / (high - low))


def to_floats(values: pd.Series) -> Float[np.ndarray, "n"]:
    """Convert values on a scale to float64: missing, infinite and above 1e200 become NaN, below 1e-200 zero.

    Closer to the limits of float64, the ticks and margins of both renderers overflow.
    """
    numbers = values.to_numpy(dtype=float, na_value=np.nan)
    size = np.abs(numbers)
    return np.where(size <= _LARGEST, np.where(size >= 1 / _LARGEST, numbers, 0.0), np.nan)


def categories(columns: Sequence[pd.Series], first: Iterable[Any] = ()) -> tuple[Any, ...]:
    """Return the distinct values on a scale: ``first``, then sorted numbers, categoricals in order, others as found."""
    met: dict[Any, None] = {}
    for values in columns:
        if isinstance(values.dtype, pd.CategoricalDtype):
            values = pd.Series(values.cat.categories[values.cat.categories.isin(values)])
        met.update(dict.fromkeys(values.dropna().unique()))
    values_in_order = list(met)
    if columns and all(map(is_numeric, columns)):
        values_in_order.sort()
    return tuple(dict.fromkeys([*first, *values_in_order]))


def scale(chart: Chart, letter: str) -> Scale:
    """Return the "x" or "y" scale of a chart."""
    axis, columns = getattr(chart, letter), chart.values(letter)
    if chart.is_categorical(letter):
        return Scale(axis, categories(columns, axis.order or ()))
    return Scale(axis, None, is_integer=bool(columns) and all(map(is_integer_dtype, columns)))


def color_columns(charts: Sequence[Chart]) -> dict[str, Colors]:
    """Return the color scales of all columns that color marks; a value has the same color in all panels.

    Categories get palette colors; more numbers than palette colors become a color scale.
    """
    colors = {}
    for column, uses in encoded(charts, "color").items():
        columns, label, first = [], "", None
        for chart, mark in uses:
            columns.append(chart.table(mark)[column])
            label = label or chart.color_label
            if first is None:
                first = chart.colors
        values = categories(columns, first or ())
        limits = None
        if first is None and len(values) > PALETTE_SIZE and all(map(is_numeric, columns)):
            limits = color_limits(to_floats(pd.Series(values)), default=(0.0, 1.0))
            label = label or column
        colors[column] = Colors(label, values, limits)
    return colors


def color_limits(numbers: Float[np.ndarray, "n"], default: Limits) -> Limits:
    """Return the ends of a color scale of numbers, which are distinct; ``default`` if no number is finite."""
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return default
    low, high = float(numbers.min()), float(numbers.max())
    if low == high:
        high = low + 1.0
    return low, high


def bulk_limits(numbers: Float[np.ndarray, "n"]) -> Limits:
    """Return the ends of a color scale of finite numbers without the few outliers that would take more than half of it.

    Outliers are beyond the outer fences of Tukey (1977), three times the distance of the quartiles from them.
    """
    low, high = float(numbers.min()), float(numbers.max())
    first, third = np.quantile(numbers, (0.25, 0.75))
    reach = 3 * (third - first)
    bulk = numbers[(numbers >= first - reach) & (numbers <= third + reach)]
    if bulk.size < _BULK * numbers.size or not 0 < bulk.max() - bulk.min() < (high - low) / 2:
        return low, high
    return float(bulk.min()), float(bulk.max())


def style_columns(charts: Sequence[Chart]) -> dict[str, tuple[Any, ...]]:
    """Return the scale of every dash or shape column, its ordered values; a value has one style in all panels."""
    styles = {}
    for column, uses in encoded(charts, "dash", "shape").items():
        styles[column] = categories([chart.table(mark)[column] for chart, mark in uses])
    return styles


def encoded(charts: Sequence[Chart], *encodings: str) -> dict[str, list[tuple[Chart, Mark]]]:
    """Return the columns to scale for these encodings, each with the charts and marks that use it."""
    uses: dict[str, list[tuple[Chart, Mark]]] = {}
    for chart in charts:
        for mark in chart.marks:
            for column in mark.distinct_columns(*encodings):
                uses.setdefault(column, []).append((chart, mark))
    return uses
