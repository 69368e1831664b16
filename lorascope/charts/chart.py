"""A figure as data: a tidy table, the marks drawn from it, and the axes.

A :class:`Chart` does not draw. It maps columns to positions, colors and error bars, and checks that they exist. The
backends in this package draw it and are imported on demand. So a figure can be tested, hashed and exported without a
renderer, and both renderers show the same numbers.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from lorascope.charts.figure_style import Palette
from lorascope.charts.marks import Axis, Bar, Heat, Mark, is_numeric, missing_column

M = TypeVar("M", bound=Mark)


class Drawable:
    """Base class of charts and panels, with the methods that draw and save them."""

    def rows(self) -> tuple[tuple[Chart, ...], ...]:
        """Return the panels, row by row."""
        raise NotImplementedError

    @property
    def panels(self) -> tuple[Chart, ...]:
        """Panels as single charts, row by row, each of which can be drawn on its own."""
        return tuple(chain.from_iterable(self.rows()))

    def pick_frames(self, steps: Sequence[Any] | None) -> Drawable:
        """Return the drawable with some of its frames, all if ``steps`` is None."""
        raise NotImplementedError

    def flat(self) -> pd.DataFrame:
        """Return all drawn data as one table.

        With several panels, or marks that have their own data, two columns distinguish the rows: ``panel`` (number and
        title) and ``mark`` (kind of mark, "" for the data of the chart). A column with only one value is omitted.
        """
        tables = []
        for number, chart in enumerate(self.panels, start=1):
            panel = f"{number} {chart.title}".strip()
            tables += [table.assign(panel=panel, mark=mark) for mark, table in chart.tables()]
        if len(tables) == 1:
            return self.panels[0].data
        joined = pd.concat(tables, ignore_index=True)
        counts = joined[["panel", "mark"]].nunique()
        return joined.drop(columns=counts.index[counts < 2])

    def mpl(
        self,
        ax: Any = None,
        theme: str | None = None,
        width: str | float | None = None,
        *,
        axes: Collection[Any] | None = None,
        steps: Sequence[Any] | None = None,
        height: float | None = None,
        title: str | None = None,
        caption: bool = True,
        legend: bool = True,
        palette: Palette | None = None,
    ) -> Any:
        """Draw with matplotlib.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Axes to draw a single chart on, in your own style; the caption is not drawn.
        theme : {"light", "dark", "paper"}, optional
            Default "light", or that of :func:`lorascope.set_style`.
        width : float or str, optional
            Inches, "column" (3.3), "page" (6.9), or a venue: "neurips", "iclr", "jmlr" and "tmlr", and with two columns
            "icml", "acl", "aaai", "ieee" and "nature", whose full width is "icml-page" and so on. Default: column for
            a single chart, page for panels and frames, which are in as many rows as the width requires.
        axes : sequence or array of matplotlib Axes, optional
            Axes for several panels: one for each of :attr:`panels` and, of a panel with frames, one per frame.
        steps : sequence, optional
            Frames to draw, all of them. Default: at most eight, evenly spaced, or one row of them per panel.
        height : float, optional
            Inches, with title, legend and caption. Default: as high as necessary.
        title : str, optional
            Replaces the title; "" omits it, and ``$...$`` is math. Panels keep theirs.
        caption, legend : bool
            Whether the figure has them, default True. The artists have the labels of the legend, so that
            ``ax.legend()`` draws it elsewhere.
        palette : sequence or mapping, optional
            Colors of categories, in order or by label; see :func:`lorascope.set_style`. Settings that the caller has
            changed in ``matplotlib.rcParams``, also by ``plt.style``, are kept.

        Returns
        -------
        The new figure, or ``ax`` or ``axes``.

        Raises
        ------
        ValueError
            The number of axes is not that of the panels, or the figure does not fit the size.
        """
        mpl = _import_backend("matplotlib_backend")
        if ax is not None:
            mpl.draw_onto(self, [ax], theme, title, legend, palette, steps)
            return ax
        if axes is not None:
            mpl.draw_onto(self, axes, theme, title, legend, palette, steps)
            return axes
        texts: dict[str, Any] = {"title": title, "caption": caption, "legend": legend}
        return mpl.to_matplotlib(self, theme, width, height=height, palette=palette, steps=steps, **texts)

    def plotly(
        self, theme: str | None = None, *, steps: Sequence[Any] | None = None, palette: Palette | None = None
    ) -> Any:
        """Draw as an interactive ``plotly.graph_objects.Figure``; frames, or those in ``steps``, are on a slider."""
        return _import_backend("plotly_backend").to_plotly(self.pick_frames(steps), theme, palette=palette)

    def save(
        self,
        path: str | Path,
        width: str | float | None = None,
        theme: str | None = None,
        *,
        steps: Sequence[Any] | None = None,
        height: float | None = None,
        title: str | None = None,
        caption: bool | None = None,
        legend: bool = True,
        dpi: float = 300,
        palette: Palette | None = None,
        include_js: str = "inline",
    ) -> Path:
        """Write the figure and its provenance to a file, completely or not at all; equal charts give equal bytes.

        Parameters
        ----------
        path : str or Path
            The extension selects the format: pdf, svg, pgf, png (matplotlib), html (plotly) or csv
            (data). Missing folders are created. Cells of heat maps are vectors, or an image if there are more than
            1000. pgf requires LaTeX and cannot contain such an image.
        width, steps, height, title, legend, palette
            See :meth:`mpl`; html and csv have no size.
        theme : {"light", "dark", "paper"}, optional
            Default: paper for pdf, svg and pgf, else light.
        caption : bool, optional
            Whether the caption is below the figure. Default: not for pdf, svg and pgf, whose text belongs into the
            paper; it is in the metadata, and in the file ``x.pdf-caption.txt`` next to ``x.pdf``.
        dpi : float
            Pixels per inch of a png, default 300.
        include_js : {"inline", "file", "cdn"}
            How an html page gets plotly.js (4.6 MiB): contained in it, in a file next to it that all pages of a folder
            share, or from the network. Default "inline".

        Returns
        -------
        Path of the file.

        Raises
        ------
        ValueError
            The extension is not one of these, or the figure does not fit the size.
        """
        size: dict[str, Any] = {"width": width, "height": height, "dpi": dpi, "steps": steps}
        texts: dict[str, Any] = {"title": title, "caption": caption, "legend": legend}
        return _import_backend("save").save(
            self, path, theme=theme, palette=palette, include_js=include_js, **texts, **size
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        forms = _import_backend("plotly_backend").bundle(self)
        if "text/html" not in forms:
            # nbconvert, GitHub and others do not show the form of plotly. JupyterLab would show "image/png" instead of
            # that form until the pointer is on it, and cut it in a narrow window.
            image = base64.b64encode(_import_backend("save").png_preview(self)).decode()
            forms["text/html"] = f'<img src="data:image/png;base64,{image}" style="max-width: 100%">'
        return {**forms, "text/plain": repr(self)}


def _import_backend(name: str) -> Any:
    """Import a drawing module on demand, because it imports this one."""
    return importlib.import_module(f"lorascope.charts.{name}")


@dataclass(frozen=True, eq=False, repr=False)
class Chart(Drawable):
    """Chart of one panel: tidy data and the marks drawn from it.

    Parameters
    ----------
    data : DataFrame
        One row per drawn item.
    marks : sequence of Mark
        Drawn in order, later ones on top. A mark's own ``data`` replaces ``data``.
    title : str
        Title; ``$...$`` is math.
    x, y : Axis
        Axes.
    caption : str
        Text below the figure: n, seeds, interval, definitions.
    frame : str, optional
        Column whose values are the steps of a slider (plotly) or small multiples (matplotlib). A mark whose own data
        does not have this column is the same in every frame.
    color_label : str
        Title of the legend.
    colors : iterable, optional
        Categories in the order of the palette and the legend; categories that are not listed follow.
    meta : mapping
        Stored in every saved file: run ids and other JSON values.
    square : bool
        The panel is as high as wide, as for a plane whose axes have one unit. Default False.
    span : int
        Places that the panel takes in its row. Next to a panel of 3, one of 1 has a third of its width. Default 1.

    Raises
    ------
    ValueError
        A mark names a missing column, or one whose values it cannot draw.
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
    square: bool = False
    span: int = 1

    def __post_init__(self) -> None:
        # The class is frozen. With copy on write, later edits of the table do not change the chart.
        object.__setattr__(self, "data", self.data.copy(deep=False))
        object.__setattr__(self, "marks", tuple(self.marks))
        if self.colors is not None:
            object.__setattr__(self, "colors", tuple(self.colors))
        if self.frame is not None:
            if self.frame not in self.data:
                raise ValueError(missing_column("frame", self.frame, self.data))
            if self.data[self.frame].isna().any():
                raise ValueError(f"frame: column {self.frame!r} must have no missing values")
        for mark in self.marks:
            mark.check(self.table(mark))
        heats = len(self.marks_of(Heat))
        if heats > 1:
            raise ValueError(f"a chart must have at most one Heat, got {heats}: combine charts with set_side_by_side")
        # Whether bars are horizontal depends on all marks, so each of them is checked first.
        for mark in self.marks:
            if isinstance(mark, Bar | Heat):
                self._require_unique_positions(mark)

    def __repr__(self) -> str:
        marks = ", ".join(mark.kind for mark in self.marks)
        return f"Chart({self.title!r}: {marks}; {len(self.data)} rows)"

    def rows(self) -> tuple[tuple[Chart, ...], ...]:
        return ((self,),)

    def table(self, mark: Mark) -> pd.DataFrame:
        """Return the table that a mark is drawn from."""
        if mark.data is None:
            return self.data
        return mark.data

    def marks_of(self, kind: type[M]) -> list[M]:
        """Return the marks of one kind."""
        return [mark for mark in self.marks if isinstance(mark, kind)]

    def values(self, letter: str) -> list[pd.Series]:
        """Return the columns of axis "x" or "y", one for each mark that has one."""
        columns = []
        for mark in self.marks:
            for column in mark.distinct_columns(letter):
                columns.append(self.table(mark)[column])
        return columns

    def is_categorical(self, letter: str) -> bool:
        """Return whether axis "x" or "y" is categorical.

        It is if it has an order or a heat map, or if not all of its columns are numeric.
        """
        return (
            getattr(self, letter).order is not None
            or bool(self.marks_of(Heat))
            or not all(map(is_numeric, self.values(letter)))
        )

    @property
    def is_lying(self) -> bool:
        """Whether bars and error bars run along x: y is categorical and x is numeric."""
        return self.is_categorical("y") and not self.is_categorical("x")

    def _require_unique_positions(self, mark: Bar | Heat) -> None:
        """Raise ValueError if two rows have the same position, since one would hide the other."""
        table = self.table(mark)
        if isinstance(mark, Heat):
            columns = mark.distinct_columns("x", "y")
        else:
            across, along = "yx" if self.is_lying else "xy"
            if self.is_categorical(along):
                column = getattr(mark, along)
                raise ValueError(f"bar {along}: column {column!r} must be numeric, got {table[column].dtype}")
            columns = mark.distinct_columns(across, "color")
        if self.frame is not None and self.frame in table and self.frame not in columns:
            columns.append(self.frame)
        if (doubled := table.duplicated(columns)).any():
            first = ", ".join(f"{name}={cell}" for name, cell in table.loc[doubled, columns].iloc[0].items())
            raise ValueError(f"cannot draw {mark.kind}: several rows for {first}. Aggregate them first")

    def tables(self) -> list[tuple[str, pd.DataFrame]]:
        """Return all drawn tables: ("", the chart's data), then (kind of mark, its own data)."""
        mark_tables = [(mark.kind, mark.data) for mark in self.marks if mark.data is not None]
        return [("", self.data), *mark_tables]

    def at(self, value: Any) -> Chart:
        """Return the chart of a single frame."""
        return replace(self.pick_frames([value]), frame=None)

    def pick_frames(self, steps: Sequence[Any] | None) -> Chart:
        if steps is None:
            return self
        if self.frame is None:
            raise ValueError(f"cannot select frames {list(steps)}: {self!r} has no frames")
        for value in steps:
            if value not in set(self.data[self.frame]):
                values = ", ".join(map(str, self.data[self.frame].unique()))
                raise ValueError(f"{self.frame} must be one of {values}, got {value!r}")
        marks = []
        for mark in self.marks:
            if mark.data is not None and self.frame in mark.data:
                mark = replace(mark, data=mark.data[mark.data[self.frame].isin(steps)])
            marks.append(mark)
        return replace(self, data=self.data[self.data[self.frame].isin(steps)], marks=marks)


@dataclass(frozen=True, eq=False, repr=False)
class Panels(Drawable):
    """Charts in rows, with one legend, one slider and one caption, below a ``title``.

    In print, a row has at least ``columns`` places of equal width; charts that span fewer leave the last ones empty.
    """

    grid: tuple[tuple[Chart, ...], ...]
    columns: int = 0
    title: str = ""

    def __repr__(self) -> str:
        return f"Panels({' / '.join(' | '.join(map(repr, row)) for row in self.grid)})"

    def rows(self) -> tuple[tuple[Chart, ...], ...]:
        return self.grid

    def pick_frames(self, steps: Sequence[Any] | None) -> Panels:
        framed = [chart for chart in self.panels if chart.frame is not None]
        if not framed and steps is not None:
            raise ValueError(f"cannot select frames {list(steps)}: {self!r} has no frames")
        picked = {chart: chart.pick_frames(steps) for chart in framed}
        return replace(self, grid=tuple(tuple(picked.get(chart, chart) for chart in row) for row in self.grid))

    @property
    def data(self) -> pd.DataFrame:
        """The data of all panels; see :meth:`flat`."""
        return self.flat()


def set_side_by_side(*drawables: Drawable, title: str = "") -> Panels:
    """Put charts, or panels with the same number of rows, side by side.

    The panels share one legend, the limits of axes with the same label, and the color bars of equal quantities.

    Parameters
    ----------
    *drawables : Chart or Panels
        Charts and panels, from left to right.
    title : str
        Title above the panels, which keep theirs.

    Returns
    -------
    Panels

    Raises
    ------
    ValueError
        The numbers of rows differ.

    Examples
    --------
    >>> ls.set_side_by_side(norms, spectra).save("joined.pdf", width="icml-page")
    """
    grids = [drawable.rows() for drawable in drawables]
    counts = list(map(len, grids))
    if len(set(counts)) != 1:
        raise ValueError(f"panels side by side must have the same number of rows, got {', '.join(map(str, counts))}")
    return Panels(tuple(sum(rows, ()) for rows in zip(*grids, strict=True)), title=title)


def stack_vertically(*drawables: Drawable, title: str = "") -> Panels:
    """Stack charts or panels vertically.

    Parameters
    ----------
    *drawables : Chart or Panels
        Charts and panels, from top to bottom. What they share: see `set_side_by_side`.
    title : str
        Title above the panels, which keep theirs.

    Returns
    -------
    Panels
    """
    return Panels(sum((drawable.rows() for drawable in drawables), ()), title=title)


def wrap(charts: Sequence[Chart], row: int, title: str = "") -> Drawable:
    """Arrange charts in rows of ``row`` charts, at least one, below a title, which a single chart has as well."""
    if len(charts) == 1:
        return replace(charts[0], title=f"{title}: {charts[0].title}".removeprefix(": ").removesuffix(": "))
    row = max(row, 1)
    return Panels(tuple(tuple(charts[start : start + row]) for start in range(0, len(charts), row)), title=title)
