"""The words of a chart: axes, and the marks that turn columns of a table into something drawn.

All are frozen and hold settings alone. A mark names columns in its ``encodings``; its own ``data`` stands in for the
data of the chart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What one axis shows.

    Parameters
    ----------
    label : str
        Quantity and unit, in plain text. Panels whose axes share a label share their range.
    order : iterable, optional
        Categories in the order they are drawn; makes the axis categorical. Categories of y run from top to bottom,
        as the rows of a table do. Values of the data that it does not name follow after it.
    log : bool
        Logarithmic; values of zero and below have no place on it and leave a gap.
    limits : (low, high), optional
        Ends of a numeric axis; None at either end takes it from the data.
    ticks : mapping, optional
        Value (or category) -> text of the only ticks.
    """

    label: str = ""
    order: Iterable[Any] | None = None
    log: bool = False
    limits: Sequence[float | None] | None = None
    ticks: Mapping[Any, str] | None = None

    def __post_init__(self) -> None:
        if self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))


@dataclass(frozen=True)
class Mark:
    """Something drawn from the rows of a table; the fields in ``encodings`` name columns of it."""

    encodings: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[tuple[str, ...]] = ("color", "dash", "shape")  # encodings whose values must all be there
    numbers: ClassVar[tuple[str, ...]] = ("value", "low", "high", "size")  # encodings that numbers alone can fill

    @property
    def kind(self) -> str:
        """Its name in messages."""
        return type(self).__name__.lower()

    def columns(self) -> dict[str, str]:
        """Encoding -> column, for those in use."""
        return {name: getattr(self, name) for name in self.encodings if getattr(self, name) is not None}

    def check(self) -> None:
        """Refuse settings that contradict one another."""


@dataclass(frozen=True)
class Line(Mark):
    """A line through the rows in order of x, one for each colour and dash."""

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "color", "dash")
    x: str
    y: str
    color: str | None = None
    dash: str | None = None
    data: pd.DataFrame | None = None


@dataclass(frozen=True)
class Band(Mark):
    """The area between low and high, one for each colour."""

    encodings: ClassVar[tuple[str, ...]] = ("x", "low", "high", "color")
    x: str
    low: str
    high: str
    color: str | None = None
    data: pd.DataFrame | None = None


@dataclass(frozen=True)
class Point(Mark):
    """A dot a row; low and high are the ends of its error bar (not their distances), along the numeric axis.

    The area of a dot grows with the column ``size``.
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "color", "shape", "size", "low", "high")
    x: str
    y: str
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    low: str | None = None
    high: str | None = None
    data: pd.DataFrame | None = None

    def check(self) -> None:
        _check_interval(self)


@dataclass(frozen=True)
class Bar(Mark):
    """A bar a row, those of one place side by side or stacked; it lies down where y holds categories and x numbers.

    Low and high are the ends of its error bar, not their distances.
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "color", "low", "high")
    x: str
    y: str
    color: str | None = None
    mode: str = "group"
    low: str | None = None
    high: str | None = None
    data: pd.DataFrame | None = None

    def check(self) -> None:
        _check_choice("mode", self.mode, ("group", "stack"))
        _check_interval(self)


@dataclass(frozen=True)
class Heat(Mark):
    """A coloured cell a row; cells without a row, or with NaN, are hatched: unknown is not zero.

    Both axes are categorical. ``label`` names the colour bar, ``text`` is a format such as ".2f" for numbers in the
    cells, ``limits`` the ends of the colours. The diverging scale is centred at zero. Column ``words`` says more of
    a cell than its number, and takes the number's place: in print where there is room, on a screen at the pointer.
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "value", "words")
    names: ClassVar[tuple[str, ...]] = ("x", "y")
    x: str
    y: str
    value: str
    label: str = ""
    text: str | None = None
    scale: str = "sequence"
    log: bool = False
    limits: Sequence[float] | None = None
    words: str | None = None
    data: pd.DataFrame | None = None

    def check(self) -> None:
        _check_choice("scale", self.scale, ("sequence", "diverging"))
        if self.log and self.scale == "diverging":
            raise ValueError("a diverging scale is centred at zero and cannot be logarithmic: leave out one of the two")


@dataclass(frozen=True)
class Rule(Mark):
    """A straight line across the panel at the value x, or at the value y."""

    x: Any = None
    y: Any = None
    label: str = ""

    def check(self) -> None:
        if (self.x is None) == (self.y is None):
            raise ValueError(f"a rule stands at one value, x or y; got x={self.x!r}, y={self.y!r}")


@dataclass(frozen=True)
class Span(Mark):
    """The stretch of the x axis from the value x0 to the value x1, shaded."""

    x0: Any
    x1: Any
    label: str = ""


@dataclass(frozen=True)
class Text(Mark):
    """The words of column ``text``, one a row."""

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "text")
    x: str
    y: str
    text: str
    data: pd.DataFrame | None = None


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choose {' or '.join(choices)}")


def _check_interval(mark: Point | Bar) -> None:
    if (mark.low is None) != (mark.high is None):
        raise ValueError(f"an error bar has two ends; got low={mark.low!r}, high={mark.high!r}")


def check_columns(mark: Mark, table: pd.DataFrame) -> None:
    """Refuse a mark whose columns are missing, or hold what it cannot draw."""
    for encoding, column in mark.columns().items():
        what = f"{mark.kind} {encoding}"
        if column not in table:
            raise ValueError(missing_column(what, column, table))
        if encoding in mark.numbers and not is_numeric_dtype(table[column]):
            raise ValueError(f"{what}: column {column!r} holds {table[column].dtype}, not numbers")
        if (encoding in mark.names or not is_number(table[column])) and (gaps := int(table[column].isna().sum())):
            raise ValueError(f"{what}: column {column!r} has {gaps} missing values; give them a name to draw them")


def check_unique(mark: Mark, table: pd.DataFrame, place: Sequence[str]) -> None:
    """Refuse two rows in one place, where one would hide the other."""
    columns = list(dict.fromkeys(place))
    doubled = table.duplicated(columns)
    if doubled.any():
        first = ", ".join(f"{name}={cell}" for name, cell in table.loc[doubled, columns].iloc[0].items())
        raise ValueError(f"{mark.kind}: several rows for {first}; aggregate them first")


def missing_column(what: str, column: str, table: pd.DataFrame) -> str:
    """The complaint about a column that is not there."""
    return f"{what}: no column {column!r}; the data has {', '.join(map(str, table.columns))}"


def is_number(values: pd.Series) -> bool:
    """Whether a column stands on a numeric axis: numbers, but not truth values."""
    return is_numeric_dtype(values) and not is_bool_dtype(values)
