"""A figure as data: a tidy table, the marks drawn from it, and what the axes mean.

A :class:`Chart` draws nothing. It says which columns become positions, colours and error bars, checks that they are
there, and leaves the drawing to the backends beside it, which are imported when a picture is asked for. So a figure can
be tested, hashed and exported without a renderer, and both renderers show the same numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.charts.marks import (
    Axis,
    Band,
    Bar,
    Heat,
    Line,
    Mark,
    Point,
    Rule,
    Span,
    Text,
    check_columns,
    check_unique,
    is_number,
    missing_column,
)

__all__ = [
    "Axis",
    "Band",
    "Bar",
    "Chart",
    "Drawable",
    "Heat",
    "Line",
    "Mark",
    "Panels",
    "Point",
    "Rule",
    "Span",
    "Text",
    "set_side_by_side",
    "stack_vertically",
]


class Drawable:
    """What a chart and several panels have in common: they can be shown and saved."""

    def rows(self) -> tuple[tuple[Chart, ...], ...]:
        """The panels, row by row."""
        raise NotImplementedError

    def flat(self) -> pd.DataFrame:
        """All the data drawn, as one table.

        Where there are several panels, or marks with data of their own, the columns ``panel`` (number and title) and
        ``mark`` (its kind, "" for the data of the chart) tell the rows apart.
        """
        charts = [chart for row in self.rows() for chart in row]
        parts = [
            table.assign(panel=f"{number} {chart.title}".strip(), mark=mark)
            for number, chart in enumerate(charts, start=1)
            for mark, table in chart.tables()
        ]
        if len(parts) == 1:
            return charts[0].data
        joined = pd.concat(parts, ignore_index=True)
        return joined.drop(columns=[column for column in ("panel", "mark") if joined[column].nunique() < 2])

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
        mpl = _import_backend("matplotlib_backend")
        return mpl.figure(self, theme, width) if ax is None else mpl.draw_onto(ax, self, theme)

    def plotly(self, theme: str | None = None) -> Any:
        """Draw as an interactive ``plotly.graph_objects.Figure``; frames become the steps of a slider."""
        return _import_backend("plotly_backend").figure(self, theme)

    def save(self, path: str | Path, width: str | None = None, theme: str | None = None) -> Path:
        """Write the figure to a file whose ending says the kind; see :func:`lorascope.charts.save.save`."""
        return _import_backend("save").save(self, path, width, theme)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {**_import_backend("plotly_backend").bundle(self), "text/plain": repr(self)}


def _import_backend(name: str) -> Any:
    """Import a module that draws charts; it depends on this one."""
    return importlib.import_module(f"lorascope.charts.{name}")


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
        if self.frame is not None:
            if self.frame not in self.data:
                raise ValueError(missing_column("frame", self.frame, self.data))
            if self.data[self.frame].isna().any():
                raise ValueError(f"frame: column {self.frame!r} has missing values")
        for mark in self.marks:
            mark.check()
            check_columns(mark, self.table(mark))
        if sum(isinstance(mark, Heat) for mark in self.marks) > 1:
            raise ValueError("a chart holds one heat; set two charts beside each other")
        for mark in self.marks:
            if isinstance(mark, Bar | Heat):
                check_unique(mark, self.table(mark), self._place_columns(mark))

    def __repr__(self) -> str:
        marks = ", ".join(mark.kind for mark in self.marks)
        return f"Chart({self.title!r}: {marks}; {len(self.data)} rows)"

    def rows(self) -> tuple[tuple[Chart, ...], ...]:
        return ((self,),)

    def table(self, mark: Mark) -> pd.DataFrame:
        """The table that a mark is drawn from."""
        own = getattr(mark, "data", None)
        return self.data if own is None else own

    def is_categorical(self, letter: str) -> bool:
        """Whether axis "x" or "y" holds categories: it has an order or a heat, or its columns are not all numbers."""
        columns = [self.table(mark)[mark.columns()[letter]] for mark in self.marks if letter in mark.columns()]
        return (
            getattr(self, letter).order is not None
            or any(isinstance(mark, Heat) for mark in self.marks)
            or not all(map(is_number, columns))
        )

    @property
    def is_lying(self) -> bool:
        """Whether bars and error bars run along x: y holds categories and x numbers."""
        return self.is_categorical("y") and not self.is_categorical("x")

    def _place_columns(self, mark: Bar | Heat) -> list[str]:
        """The columns that say where a bar or a cell is drawn."""
        if isinstance(mark, Heat):
            place = [mark.x, mark.y]
        else:
            along = "x" if self.is_lying else "y"
            if self.is_categorical(along):
                raise ValueError(f"bar {along}: column {getattr(mark, along)!r} holds no numbers to draw a length from")
            place = [mark.y if self.is_lying else mark.x, *([mark.color] if mark.color is not None else [])]
        return [*place, self.frame] if self.frame is not None and self.frame in self.table(mark) else place

    def tables(self) -> list[tuple[str, pd.DataFrame]]:
        """Everything drawn: ("", the chart's data), then (kind of mark, its own data)."""
        own = [(mark.kind, table) for mark in self.marks if (table := getattr(mark, "data", None)) is not None]
        return [("", self.data), *own]

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
        """The data of all panels; see :meth:`flat`."""
        return self.flat()


def set_side_by_side(*parts: Drawable) -> Panels:
    """Set charts, or panels with the same number of rows, side by side."""
    grids = [part.rows() for part in parts]
    if len({len(grid) for grid in grids}) != 1:
        raise ValueError(f"beside needs parts of the same number of rows, got {', '.join(str(len(g)) for g in grids)}")
    return Panels(tuple(sum(rows, ()) for rows in zip(*grids, strict=True)))


def stack_vertically(*parts: Drawable) -> Panels:
    """Set charts or panels one above the other, the first on top."""
    return Panels(sum((part.rows() for part in parts), ()))


def wrap(charts: Sequence[Chart], row: int) -> Drawable:
    """Set charts side by side, so many a row and one at least; one chart alone stays as it is."""
    if len(charts) == 1:
        return charts[0]
    row = max(row, 1)
    return Panels(tuple(tuple(charts[start : start + row]) for start in range(0, len(charts), row)))
