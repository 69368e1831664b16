"""Mapping from values to positions and colors, before anything is drawn.

Categories have the positions 0, 1, 2, ... in both renderers, so that lines, bars, cells and text share one axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from pandas.api.types import is_integer_dtype

from lorascope.charts.chart import Axis, Chart
from lorascope.charts.marks import is_number
from lorascope.charts.theme import GLYPH, PALETTE_SIZE, Theme
from lorascope.files.printable import short_name

_LARGEST = 1e200


@dataclass(frozen=True)
class Scale:
    """One axis of one panel.

    ``categories`` is None for a numeric axis; ``whole`` restricts its ticks to integers.
    """

    axis: Axis
    categories: tuple[Any, ...] | None
    whole: bool = False

    @property
    def log(self) -> bool:
        """Whether the axis is numeric and logarithmic."""
        return self.axis.log and self.categories is None

    @property
    def is_wordy(self) -> bool:
        """Whether most categories are words, each of which should be readable, and not consecutive numbers."""
        names = [short_name(category) for category in self.categories or ()]
        return 2 * sum(map(_is_digits, names)) < len(names)

    def place(self, values: pd.Series) -> Float[np.ndarray, "n"]:
        """Return positions of values; NaN for values without one (missing, infinite, or <= 0 on a log axis)."""
        if self.categories is None:
            numbers = to_floats(values)
            return np.where(numbers > 0, numbers, np.nan) if self.log else numbers
        # A number between numeric categories has a position, for example that of a rule at step 15.
        if is_number(values) and is_number(pd.Series(self.categories)):
            return _interpolate_places(to_floats(values), np.asarray(self.categories, dtype=float))
        places = {category: place for place, category in enumerate(self.categories)}
        return np.array([places.get(value, np.nan) for value in values], dtype=float)

    def locate(self, value: Any) -> float:
        """Return the position of one value, for a rule or a span."""
        place = float(self.place(pd.Series([value]))[0])
        if np.isnan(place):
            allowed = "a finite number > 0" if self.log else "a finite number"
            if self.categories is not None:
                allowed = f"one of {', '.join(map(str, self.categories))}"
            raise ValueError(f"position on axis {self.axis.label!r} must be {allowed}, got {value!r}")
        return place

    def nearest_names(self, positions: Iterable[float]) -> list[str]:
        """Return the names of the categories nearest to these positions, "" if there is none."""
        names = dict(enumerate(map(short_name, self.categories or ())))
        return [names.get(round(place), "") if np.isfinite(place) else "" for place in positions]

    def ticks(self, room: float, size: float, across: bool) -> tuple[list[float], list[str], bool]:
        """Choose the tick positions and names.

        Parameters
        ----------
        room : float
            Length of the axis, in the unit of ``size``.
        size : float
            Font size.
        across : bool
            Whether names are perpendicular to the axis, as on a vertical one.

        Returns
        -------
        (positions, names, turned) : ``turned`` is True if the names only fit vertically.
        """
        if self.axis.ticks is not None:
            return list(self.place(pd.Series(list(self.axis.ticks)))), list(self.axis.ticks.values()), False
        names = [short_name(category) for category in self.categories or ()]
        digits = [_is_digits(name) for name in names]
        widths = [(len(name) + 1) * GLYPH * size for name in names]
        cell = max(room, size) / max(len(names), 1)  # names on the other axis may leave no room
        crowded = any(a + b > 2 * cell for a, b in pairwise(widths))
        turned = not across and crowded and self.is_wordy
        lengths = [1.25 * size / cell] * len(names) if across or turned else [width / cell for width in widths]
        kept = _spread_names(digits, lengths)
        return [float(index) for index in kept], [names[index] for index in kept], turned


def _is_digits(name: str) -> bool:
    return name.lstrip("-").replace(".", "", 1).isdigit()


def _interpolate_places(values: Float[np.ndarray, "n"], known: Float[np.ndarray, "k"]) -> Float[np.ndarray, "n"]:
    """Return positions of numbers among numeric categories, interpolated between neighbors."""
    order = np.argsort(known)
    ends = (-0.5, len(known) - 0.5)
    left, right = ends if order[0] <= order[-1] else ends[::-1]
    return np.interp(values, known[order], order.astype(float), left=left, right=right)


def _spread_names(digits: Sequence[bool], lengths: Sequence[float]) -> list[int]:
    """Return indices of names to write, of ``lengths`` in cells: words that fit, numbers at round steps."""
    words = [index for index, number in enumerate(digits) if not number]
    numbers = [index for index, number in enumerate(digits) if number]
    if not numbers:
        return words[:: int(np.ceil(max(lengths, default=1.0)))]
    longest = max(lengths[index] for index in numbers)
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step >= longest), 1000)
    kept: list[int] = []
    # Words come first, and numbers fill the gaps.
    for index in words + numbers[::step]:
        if all(abs(index - other) >= (lengths[index] + lengths[other]) / 2 for other in kept):
            kept.append(index)
    return sorted(kept)


@dataclass(frozen=True)
class Colors:
    """Colors of one column: by category or, if ``limits`` are set, by number between them."""

    label: str
    categories: tuple[Any, ...]
    limits: tuple[float, float] | None = None

    def of(self, value: Any, theme: Theme) -> str:
        """Return the color of a value."""
        if self.limits is None:
            return theme.category(self.categories.index(value), len(self.categories))
        low, high = self.limits
        return theme.color_at((float(value) - low) / (high - low))


def to_floats(values: pd.Series) -> Float[np.ndarray, "n"]:
    """Convert to float64: missing, infinite and magnitudes above 1e200 become NaN, below 1e-200 zero.

    Closer to the limits of float64, the ticks and margins of both renderers overflow.
    """
    numbers = values.to_numpy(dtype=float, na_value=np.nan)
    size = np.abs(numbers)
    return np.where(size <= _LARGEST, np.where(size >= 1 / _LARGEST, numbers, 0.0), np.nan)


def categories(columns: Sequence[pd.Series], first: Iterable[Any] = ()) -> tuple[Any, ...]:
    """Return distinct values: ``first``, then sorted numbers, categoricals in their order, others as found."""
    met: dict[Any, None] = {}
    for values in columns:
        if isinstance(values.dtype, pd.CategoricalDtype):
            values = pd.Series(values.cat.categories[values.cat.categories.isin(values)])
        met.update(dict.fromkeys(values.dropna().unique()))
    known = sorted(met) if columns and all(map(is_number, columns)) else list(met)
    return tuple(dict.fromkeys([*first, *known]))


def scale(chart: Chart, letter: str) -> Scale:
    """Return the "x" or "y" scale of a chart."""
    axis: Axis = getattr(chart, letter)
    columns = [chart.table(mark)[mark.columns()[letter]] for mark in chart.marks if letter in mark.columns()]
    if chart.is_categorical(letter):
        return Scale(axis, categories(columns, axis.order or ()))
    return Scale(axis, None, whole=bool(columns) and all(map(is_integer_dtype, columns)))


def color_columns(charts: Sequence[Chart]) -> dict[str, Colors]:
    """Return the colors of every column that colors marks; a value has the same color in all panels."""
    uses = _encoding_uses(charts, "color")
    return {column: _choose_colors(column, *zip(*found, strict=True)) for column, found in uses.items()}


def style_columns(charts: Sequence[Chart]) -> dict[str, tuple[Any, ...]]:
    """Return the ordered values of every dash or shape column; a value has one style in all panels."""
    uses = _encoding_uses(charts, "dash", "shape")
    return {column: categories([values for _, values in found]) for column, found in uses.items()}


def _encoding_uses(charts: Sequence[Chart], *encodings: str) -> dict[str, list[tuple[Chart, pd.Series]]]:
    """Return the columns of these encodings, each with the charts and values of its marks."""
    uses: dict[str, list[tuple[Chart, pd.Series]]] = {}
    for chart in charts:
        for mark in chart.marks:
            used = mark.columns()
            for column in dict.fromkeys(used[encoding] for encoding in encodings if encoding in used):
                uses.setdefault(column, []).append((chart, chart.table(mark)[column]))
    return uses


def _choose_colors(column: str, charts: Sequence[Chart], columns: Sequence[pd.Series]) -> Colors:
    """Assign palette colors to categories; more numbers than palette colors become a color scale."""
    label = next((chart.color_label for chart in charts if chart.color_label), "")
    first = next((chart.colors for chart in charts if chart.colors is not None), None)
    known = categories(columns, first or ())
    if first is None and len(known) > PALETTE_SIZE and all(map(is_number, columns)):
        drawn = to_floats(pd.Series(known))
        drawn = drawn[np.isfinite(drawn)]
        low, high = (drawn[0], drawn[-1]) if len(drawn) else (0.0, 1.0)
        return Colors(label or column, known, (float(low), float(high) if high > low else float(low) + 1.0))
    return Colors(label, known)
