"""Axes and marks of a chart. A mark maps columns of a table to drawn shapes.

All classes are frozen and contain only settings. The fields of a mark listed in its ``encodings`` name columns, and its
own ``data`` replaces the data of the chart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Axis for the marks of a chart: its label, scale and ticks.

    Parameters
    ----------
    label : str
        Quantity and unit; ``$...$`` is math. Panels whose axes have the same label share their limits.
    order : iterable, optional
        Categories in drawing order; makes the axis categorical. Categories of y run from top to bottom, like the rows
        of a table. Values that are not listed follow.
    log : bool
        Logarithmic scale, default False. Values <= 0 are not drawn and leave a gap.
    limits : (low, high), optional
        Ends of a numeric axis; None at either end takes it from the data.
    ticks : mapping, optional
        Value (or category) -> label; no other ticks are drawn.
    compact : bool
        A categorical y axis is as high as its categories require, even if they are few. Default False.
    """

    label: str = ""
    order: Iterable[Any] | None = None
    log: bool = False
    limits: Sequence[float | None] | None = None
    ticks: Mapping[Any, str] | None = None
    compact: bool = False

    def __post_init__(self) -> None:
        if self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))


@dataclass(frozen=True)
class Mark:
    """Base class of marks, drawn from the rows of a table; the fields in ``encodings`` name its columns."""

    encodings: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[tuple[str, ...]] = ("color", "dash", "shape")  # encodings without missing values
    numbers: ClassVar[tuple[str, ...]] = ("value", "low", "high", "size")  # encodings that must be numeric
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # allowed values of settings
    data: pd.DataFrame | None = field(default=None, kw_only=True)

    @property
    def kind(self) -> str:
        """Name of the mark in messages."""
        return type(self).__name__.lower()

    def columns(self) -> dict[str, str]:
        """Return encoding -> column for the encodings in use."""
        return {name: getattr(self, name) for name in self.encodings if getattr(self, name) is not None}

    def distinct_columns(self, *encodings: str) -> list[str]:
        """Return the columns of those of these encodings that are in use, each once."""
        used = self.columns()
        return list(dict.fromkeys(used[encoding] for encoding in encodings if encoding in used))

    def check(self, table: pd.DataFrame) -> None:
        """Raise ValueError if settings contradict each other, or the mark cannot draw its columns of a table."""
        for name, allowed in self.choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        low, high = getattr(self, "low", None), getattr(self, "high", None)
        if (low is None) != (high is None):
            raise ValueError(f"low and high must both be columns or both be None, got low={low!r}, high={high!r}")
        for encoding, column in self.columns().items():
            label = f"{self.kind} {encoding}"
            if column not in table:
                raise ValueError(missing_column(label, column, table))
            values = table[column]
            if encoding in self.numbers and not is_numeric_dtype(values):
                raise ValueError(f"{label}: column {column!r} must be numeric, got {values.dtype}")
            if (encoding in self.names or not is_numeric(values)) and (gaps := int(values.isna().sum())):
                raise ValueError(
                    f"{label}: column {column!r} must have no missing values, got {gaps}: fill them in first"
                )


@dataclass(frozen=True)
class Line(Mark):
    """Mark of a line through the rows in order of x, one per color and dash pattern.

    Parameters
    ----------
    x, y : str
        Columns of the positions. Missing values leave a gap.
    color : str, optional
        Column of the categories that colors and dash patterns distinguish.
    dash : str, optional
        Column of the categories that dash patterns distinguish. Default: that of ``color``.
    stretch : str, optional
        Column of stretches: rows of different ones are not joined.
    muted : bool
        Whether the lines are thin and gray, as between the dots that they join. Default False.
    data : DataFrame, optional
        Table of this mark. Default: the table of the chart.

    Examples
    --------
    >>> ls.Chart(table, [ls.Line("step", "loss", "recipe")]).save("loss.pdf", width="icml")
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "color", "dash", "stretch")
    x: str
    y: str
    color: str | None = None
    dash: str | None = None
    stretch: str | None = None
    muted: bool = False


@dataclass(frozen=True)
class Band(Mark):
    """Mark of the area between ``low`` and ``high``, one per color.

    Parameters
    ----------
    x, low, high : str
        Columns of the positions and of the lower and upper ends.
    color : str, optional
        Column of the categories that colors distinguish.
    stretch : str, optional
        Column of stretches: rows of different ones are not joined.
    muted : bool
        Whether the area is gray, as a range without effect. Default False.
    data : DataFrame, optional
        Table of this mark. Default: the table of the chart.
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "low", "high", "color", "stretch")
    x: str
    low: str
    high: str
    color: str | None = None
    stretch: str | None = None
    muted: bool = False


@dataclass(frozen=True)
class Point(Mark):
    """Mark with one dot per row.

    Parameters
    ----------
    x, y : str
        Columns of the positions.
    color : str, optional
        Column of the categories that colors and shapes distinguish. More than eight numbers become a color scale.
    shape : str, optional
        Column of the categories that shapes distinguish. Default: that of ``color``.
    size : str, optional
        Column of numbers >= 0 to which the areas of the dots are proportional.
    low, high : str, optional
        Columns with the ends of the error bars on the numeric axis, not distances.
    symbol : {"", "circle", "circle-open", "diamond", "line-ns-open", "x"}
        Shape of all dots. Default "": by ``shape`` or ``color``.
    label : str
        Legend entry of all dots, which replaces those of their colors. Default "".
    hollow : bool
        Whether dots are outlines. Default False.
    muted : bool
        Whether dots are gray, as rings around others. Default False.
    data : DataFrame, optional
        Table of this mark. Default: the table of the chart.
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "color", "shape", "size", "low", "high")
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "symbol": ("", "circle", "circle-open", "diamond", "line-ns-open", "x")
    }
    x: str
    y: str
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    low: str | None = None
    high: str | None = None
    symbol: str = ""
    label: str = ""
    hollow: bool = False
    muted: bool = False


@dataclass(frozen=True)
class Bar(Mark):
    """Mark with one bar per row, horizontal if y is categorical and x is numeric.

    Parameters
    ----------
    x, y : str
        Columns of the positions and of the lengths.
    color : str, optional
        Column of the categories that colors distinguish.
    mode : {"group", "stack"}
        Whether bars at the same position are side by side, by default, or stacked.
    low, high : str, optional
        Columns with the ends of the error bars, not distances.
    data : DataFrame, optional
        Table of this mark. Default: the table of the chart.
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "color", "low", "high")
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"mode": ("group", "stack")}
    x: str
    y: str
    color: str | None = None
    mode: str = "group"
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True)
class Heat(Mark):
    """Mark with one colored cell per row. Cells without a row or with NaN are hatched, since unknown is not zero.

    Parameters
    ----------
    x, y : str
        Columns of the positions. Both axes are categorical.
    value : str
        Column of the numbers that colors show.
    label : str
        Label of the color bar. Heat maps with the same label share one.
    text : str, optional
        Format of the numbers in the cells, such as ``".2f"``. Default: no numbers.
    scale : {"sequence", "diverging"}
        Colors. The diverging ones are centered at zero. Default "sequence".
    limits : (low, high), optional
        Ends of the color scale; None at either end takes it from the numbers. An outlier that would take more than
        half of the scale is beyond its end, as the label of the color bar says.
    words : str, optional
        Column that replaces the number of a cell: in print if ``text`` is set and the words fit, on a screen when
        hovering.
    data : DataFrame, optional
        Table of this mark. Default: the table of the chart.
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "value", "words")
    names: ClassVar[tuple[str, ...]] = ("x", "y")
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"scale": ("sequence", "diverging")}
    x: str
    y: str
    value: str
    label: str = ""
    text: str | None = None
    scale: str = "sequence"
    limits: Sequence[float | None] | None = None
    words: str | None = None


@dataclass(frozen=True)
class Rule(Mark):
    """Mark of a straight line across the panel, at one value of x or of y.

    Parameters
    ----------
    x, y : value, optional
        Position; one of them is required.
    label : str
        Text next to the line.
    data : DataFrame, optional
        Table of this mark. Default: the table of the chart.
    """

    x: Any = None
    y: Any = None
    label: str = ""

    def check(self, table: pd.DataFrame) -> None:
        if (self.x is None) == (self.y is None):
            raise ValueError(f"a Rule must have exactly one of x and y, got x={self.x!r}, y={self.y!r}")


@dataclass(frozen=True)
class Text(Mark):
    """Mark with one text per row.

    Parameters
    ----------
    x, y : str
        Columns of the positions.
    text : str
        Column of the texts.
    muted : bool
        Whether the texts are gray. Default False.
    data : DataFrame, optional
        Table of this mark. Default: the table of the chart.
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "text")
    x: str
    y: str
    text: str
    muted: bool = False


def missing_column(label: str, column: str, table: pd.DataFrame) -> str:
    """Return the error message for a missing column of a mark."""
    return f"{label}: unknown column {column!r}; expected one of {', '.join(map(str, table.columns))}"


def is_numeric(values: pd.Series) -> bool:
    """Return whether a column of a mark is numeric, and not boolean."""
    return is_numeric_dtype(values) and not is_bool_dtype(values)
