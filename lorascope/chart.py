"""A figure as data: a tidy table, the marks drawn from it, and what the axes mean.

A :class:`Chart` draws nothing. It says which columns become positions, colours and error bars, checks that they are
there, and leaves the drawing to ``lorascope.render``, which is imported when a picture is asked for. So a figure can be
tested, hashed and exported without a renderer, and both renderers show the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
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
    limits: Sequence[float | int | None] | None = None
    ticks: Mapping[Any, str] | None = None

    def __post_init__(self) -> None:
        if self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))


@dataclass(frozen=True)
class Mark:
    """Something drawn from the rows of a table; the fields in ``encodings`` name columns of it."""

    encodings: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[tuple[str, ...]] = ("color", "dash", "shape")  # encodings whose values are always categories

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
    cells, ``limits`` the ends of the colours. The diverging scale is centred at zero.
    """

    encodings: ClassVar[tuple[str, ...]] = ("x", "y", "value")
    names: ClassVar[tuple[str, ...]] = ("x", "y")
    x: str
    y: str
    value: str
    label: str = ""
    text: str | None = None
    scale: str = "sequence"
    log: bool = False
    limits: Sequence[float | int] | None = None
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


class Drawable:
    """What a chart and several panels have in common: they can be shown and saved."""

    def rows(self) -> tuple[tuple[Chart, ...], ...]:
        """The panels, row by row."""
        raise NotImplementedError

    def mpl(self, ax: Any = None, theme: str | None = None, width: str | None = None) -> Any:
        """Draw with matplotlib.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Axes of your own to draw on, in your own style: a single chart without frames. The caption is left to you.
        theme : {"light", "dark", "paper"}, optional
            Default light.
        width : {"column", "page"}, optional
            3.3 or 6.9 inches; default column, and page for panels and frames.

        Returns
        -------
        Figure, or ``ax``.
        """
        from lorascope.render import mpl

        return mpl.figure(self, theme, width) if ax is None else mpl.onto(ax, self, theme)

    def plotly(self, theme: str | None = None) -> Any:
        """Draw as an interactive ``plotly.graph_objects.Figure``; frames become the steps of a slider."""
        from lorascope.render import plotly

        return plotly.figure(self, theme)

    def save(self, path: str | Path, width: str | None = None, theme: str | None = None) -> Path:
        """Write the figure to a file whose ending says the kind; see :func:`lorascope.render.save`."""
        from lorascope.render import save

        return save(self, path, width, theme)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        figure = self.plotly()
        shown = figure._repr_mimebundle_() or {"application/vnd.plotly.v1+json": figure.to_plotly_json()}
        return {**shown, "text/plain": repr(self)}


@dataclass(frozen=True, eq=False, repr=False)
class Chart(Drawable):
    """One panel: tidy data and the marks drawn from it.

    Parameters
    ----------
    data : DataFrame
        One row a thing drawn.
    marks : sequence of Mark
        Drawn in order, later ones on top. A mark's own ``data`` stands in for ``data``.
    title : str
        Title.
    x, y : Axis
        The axes.
    caption : str
        Printed below: n, seeds, interval, definitions.
    frame : str, optional
        Column whose values are the steps of a slider (plotly) or small multiples (matplotlib). Marks whose own data
        lack it stay the same in every frame.
    color_label : str
        Title of the legend.
    colors : iterable, optional
        Categories in the order of the palette and the legend; categories it does not name follow.
    meta : mapping
        Stored in every saved file: run ids and the like, JSON values.

    Raises
    ------
    ValueError
        A mark names a column that is not there, or one whose values cannot be drawn as it asks.
    """

    data: pd.DataFrame
    marks: Sequence[Mark]
    title: str = ""
    x: Axis = field(default_factory=Axis)
    y: Axis = field(default_factory=Axis)
    caption: str = ""
    frame: str | None = None
    color_label: str = ""
    colors: Iterable[Any] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", self.data.copy(deep=False))  # copy on write: later edits do not reach us
        object.__setattr__(self, "marks", tuple(self.marks))
        object.__setattr__(self, "colors", None if self.colors is None else tuple(self.colors))
        if self.frame is not None and self.frame not in self.data:
            raise ValueError(_missing("frame", self.frame, self.data))
        for mark in self.marks:
            mark.check()
            _check_columns(mark, self.table(mark), self.frame)

    def __repr__(self) -> str:
        marks = ", ".join(type(mark).__name__.lower() for mark in self.marks)
        return f"Chart({self.title!r}: {marks}; {len(self.data)} rows)"

    def rows(self) -> tuple[tuple[Chart, ...], ...]:
        return ((self,),)

    def table(self, mark: Mark) -> pd.DataFrame:
        """The table that a mark is drawn from."""
        own = getattr(mark, "data", None)
        return self.data if own is None else own

    def at(self, value: Any) -> Chart:
        """The chart of one frame alone."""
        if self.frame is None:
            raise ValueError(f"{self!r} has no frames")
        if value not in set(self.data[self.frame]):
            shown = ", ".join(map(str, self.data[self.frame].unique()))
            raise ValueError(f"no frame {value!r} in {self.frame!r}; it has {shown}")
        marks = [
            replace(mark, data=own[own[self.frame] == value])  # type: ignore[call-arg]
            if (own := getattr(mark, "data", None)) is not None and self.frame in own
            else mark
            for mark in self.marks
        ]
        return replace(self, data=self.data[self.data[self.frame] == value], marks=marks, frame=None)


@dataclass(frozen=True, eq=False, repr=False)
class Panels(Drawable):
    """Charts in rows, with one legend, one slider and one caption."""

    grid: tuple[tuple[Chart, ...], ...]

    def __repr__(self) -> str:
        return f"Panels({' / '.join(' | '.join(map(repr, row)) for row in self.grid)})"

    def rows(self) -> tuple[tuple[Chart, ...], ...]:
        return self.grid

    @property
    def data(self) -> pd.DataFrame:
        """The data of all panels, with the column ``panel``: number and title."""
        charts = [chart for row in self.grid for chart in row]
        parts = [chart.data.assign(panel=f"{n} {chart.title}".strip()) for n, chart in enumerate(charts, start=1)]
        return pd.concat(parts, ignore_index=True)


def beside(*parts: Drawable) -> Panels:
    """Set charts, or panels with the same number of rows, side by side."""
    grids = [part.rows() for part in parts]
    if len({len(grid) for grid in grids}) != 1:
        raise ValueError(f"beside needs parts of the same number of rows, got {', '.join(str(len(g)) for g in grids)}")
    return Panels(tuple(sum(rows, ()) for rows in zip(*grids, strict=True)))


def above(*parts: Drawable) -> Panels:
    """Set charts or panels one above the other, the first on top."""
    return Panels(sum((part.rows() for part in parts), ()))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choose {' or '.join(choices)}")


def _check_interval(mark: Point | Bar) -> None:
    if (mark.low is None) != (mark.high is None):
        raise ValueError(f"an error bar has two ends; got low={mark.low!r}, high={mark.high!r}")


def _check_columns(mark: Mark, table: pd.DataFrame, frame: str | None) -> None:
    """Refuse a mark whose columns are missing, or hold what it cannot draw."""
    kind = type(mark).__name__.lower()
    for encoding, column in mark.columns().items():
        if column not in table:
            raise ValueError(_missing(f"{kind} {encoding}", column, table))
        if (encoding in mark.names or not is_number(table[column])) and (gaps := int(table[column].isna().sum())):
            raise ValueError(f"{kind} {encoding}: column {column!r} has {gaps} missing values; name them to draw them")
    if isinstance(mark, Heat | Bar):
        value = "value" if isinstance(mark, Heat) else "y"
        place = [column for encoding, column in mark.columns().items() if encoding in ("x", "y", "color")]
        if value == "y" and is_number(table[mark.y]):
            place.remove(mark.y)
        elif value == "y":
            place.remove(mark.x)
        if frame in table:
            place.append(frame)
        doubled = table.duplicated(list(dict.fromkeys(place)))
        if doubled.any():
            first = ", ".join(f"{name}={cell}" for name, cell in table.loc[doubled, place].iloc[0].items())
            raise ValueError(f"{kind}: several rows for {first}; aggregate them first")


def _missing(what: str, column: str, table: pd.DataFrame) -> str:
    return f"{what}: no column {column!r}; the data has {', '.join(map(str, table.columns))}"


def is_number(values: pd.Series) -> bool:
    """Whether a column is drawn on a numeric axis: numbers, but not truth values."""
    return is_numeric_dtype(values) and not is_bool_dtype(values)
