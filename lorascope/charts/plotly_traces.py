"""Shapes as plotly traces: one function per shape, with equally many traces in every frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from lorascope.charts.figure_plan import Plan, View
from lorascope.charts.geometry import Area, Bars, Cells, Curve, Dots, Ruler, Shade, Words
from lorascope.charts.theme import FAINT, channels
from lorascope.files.printable import printable_lines

DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"]
DOT = 7.0  # diameter of a dot in pixels
LARGEST = 18.0  # diameter in pixels of the largest dot, if the area shows a column
NOTE = 11  # font size of text inside a panel, in pixels


def traces(plan: Plan, number: int, frame: Any = None) -> list[Any]:
    """Return the traces of one view in one frame, without rules and spans (see :func:`overlays`)."""
    made = [
        trace
        for shape in plan.views[number].panel.shapes(frame)
        if type(shape) in _MAKERS
        for trace in _MAKERS[type(shape)](shape, plan, number)
    ]
    return [
        trace.update(xaxis=f"x{axis_suffix(number)}", yaxis=f"y{axis_suffix(number)}", showlegend=False)
        for trace in made
    ]


def overlays(plan: Plan, number: int) -> list[dict[str, Any]]:
    """Return the rules and spans of a view as shapes of the layout; they are the same in every frame."""
    made = []
    for shape in plan.views[number].panel.shapes(plan.frames[0] if plan.frames else None):
        if isinstance(shape, Ruler):
            made.append(_trace_ruler(shape, plan, number))
        elif isinstance(shape, Shade):
            ends = {"x0": shape.x0, "x1": shape.x1, "y0": 0, "y1": 1}
            axes = {"xref": f"x{axis_suffix(number)}", "yref": f"y{axis_suffix(number)} domain"}
            label = {"text": escape_tags(shape.label), "textposition": "top center", "font": {"size": NOTE}}
            fill = {"fillcolor": add_opacity(plan.theme.ink, FAINT / 2), "line": {"width": 0}, "layer": "below"}
            made.append({"type": "rect", **ends, **axes, **fill, "label": label})
    return made


def axis_suffix(number: int) -> str:
    """Return the suffix in plotly's axis names: x, x2, x3, ..."""
    return str(number + 1) if number else ""


def escape_tags(text: str) -> str:
    """Escape text: plotly must not interpret tags, math or placeholders in it."""
    inert = escape(printable_lines(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")
    return inert.replace("\n", "<br>")


def add_opacity(color: str, opacity: float) -> str:
    """Return a color with an opacity."""
    return f"rgba({', '.join(map(str, channels(color)))}, {opacity})"


def _trace_ruler(shape: Ruler, plan: Plan, number: int) -> dict[str, Any]:
    line = {"color": plan.theme.ink, "width": 1, "dash": "dash"}
    label = {"text": escape_tags(shape.label), "textposition": "end", "xanchor": "right", "font": {"size": NOTE}}
    place: dict[str, Any]
    if shape.x is not None:
        place = {"x0": shape.x, "x1": shape.x, "y0": 0, "y1": 1}
        axes = {"xref": f"x{axis_suffix(number)}", "yref": f"y{axis_suffix(number)} domain"}
    else:
        place = {"x0": 0, "x1": 1, "y0": shape.y, "y1": shape.y}
        axes = {"xref": f"x{axis_suffix(number)} domain", "yref": f"y{axis_suffix(number)}"}
    return {"type": "line", **place, **axes, "line": line, "label": label}


def _hover_fields(
    view: View, group: str, x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], spelled: str = ""
) -> dict[str, Any]:
    """Return the text at the pointer: names on a categorical axis, and the axis ``spelled`` as text."""
    lines: list[str] = []
    texts: list[list[str]] = []
    for letter, scale, values in (("x", view.panel.x, x), ("y", view.panel.y, y)):
        shown = f"%{{customdata[{len(texts)}]}}"
        if scale.categories is not None:
            texts.append([escape_tags(name) for name in scale.nearest_names(values)])
        elif letter == spelled:
            texts.append([f"{value:.4g}" for value in values])
        else:
            shown = f"%{{{letter}:.4~g}}"
        lines.append(f"{escape_tags(scale.axis.label) or letter}: {shown}")
    template = "<br>".join(lines) + f"<extra>{escape_tags(group)}</extra>"
    return {"hovertemplate": template, "customdata": [list(row) for row in zip(*texts, strict=True)] or None}


def _trace_curve(shape: Curve, plan: Plan, number: int) -> Iterator[Any]:
    yield go.Scatter(
        x=shape.x,
        y=shape.y,
        mode="lines",
        line={"color": shape.color, "width": 2, "dash": DASHES[shape.dash % len(DASHES)]},
        legendgroup=shape.group,
        **_hover_fields(plan.views[number], shape.group, shape.x, shape.y),
    )


def _trace_area(shape: Area, plan: Plan, number: int) -> Iterator[Any]:
    x, y = _outline(shape)
    yield go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=add_opacity(shape.color, FAINT),
        legendgroup=shape.group,
        hoverinfo="skip",
    )


def _outline(shape: Area) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Return the outline of each stretch without gaps, separated by NaN."""
    known = np.isfinite(shape.x + shape.low + shape.high)
    starts = np.flatnonzero(np.diff(known.astype(int), prepend=0) == 1)
    x, y = [], []
    for start in starts:
        stop = start + int(np.argmin([*known[start:], False]))
        part = slice(start, stop)
        x += [*shape.x[part], *shape.x[part][::-1], np.nan]
        y += [*shape.high[part], *shape.low[part][::-1], np.nan]
    return np.array(x[:-1], dtype=float), np.array(y[:-1], dtype=float)


def _trace_dots(shape: Dots, plan: Plan, number: int) -> Iterator[Any]:
    size = DOT if shape.share is None else LARGEST * np.sqrt(shape.share)
    rim = {"color": plan.theme.background, "width": 0.5}
    symbol = SHAPES[shape.shape % len(SHAPES)]
    yield go.Scatter(
        x=shape.x,
        y=shape.y,
        mode="markers",
        marker={"color": shape.colors, "size": size, "symbol": symbol, "line": rim, "opacity": 1},
        legendgroup=shape.group,
        **_error_distances(shape, shape.x if shape.lying else shape.y, plan),
        **_hover_fields(plan.views[number], shape.group, shape.x, shape.y),
    )


def _trace_bars(shape: Bars, plan: Plan, number: int) -> Iterator[Any]:
    view, length = plan.views[number], shape.top - shape.base
    along = view.panel.x if shape.lying else view.panel.y
    x, y = (length, shape.place) if shape.lying else (shape.place, length)
    yield go.Bar(
        x=x,
        y=y,
        orientation="h" if shape.lying else "v",
        # A logarithmic axis has no zero to start from.
        base=None if along.log else shape.base,
        width=shape.width,
        marker={"color": shape.color, "line": {"width": 0}},
        legendgroup=shape.group,
        **_error_distances(shape, shape.top, plan),
        **_hover_fields(
            view, shape.group, x, y, spelled="x" if shape.lying else "y"
        ),  # plotly would show the top, not the length
    )


def _error_distances(shape: Dots | Bars, value: Float[np.ndarray, "n"], plan: Plan) -> dict[str, Any]:
    """Return error bars as distances from the value, as plotly expects."""
    if shape.low is None or shape.high is None:
        return {}
    colors = set(shape.colors) if isinstance(shape, Dots) else set()
    color = colors.pop() if len(colors) == 1 else plan.theme.ink
    reach = {"array": shape.high - value, "arrayminus": value - shape.low}
    look = {"type": "data", "symmetric": False, "color": color, "thickness": 1.3, "width": 0}
    return {"error_x" if shape.lying else "error_y": {**reach, **look}}


def _trace_cells(shape: Cells, plan: Plan, number: int) -> Iterator[Any]:
    """Yield the cells, and hatched ones for missing values; a logarithmic scale is drawn by exponents."""
    panel, mark = plan.views[number].panel, shape.mark
    rows, columns = (list(map(float, range(length))) for length in shape.values.shape)
    y, x = (
        [escape_tags(name) for name in scale.nearest_names(at)] for scale, at in ((panel.y, rows), (panel.x, columns))
    )
    written = mark.text is not None or mark.log
    form = mark.text or ".4g"
    told = {place: [escape_tags(text)] for place, text in shape.words.items()}
    value = "" if told else ": %{text}" if written else ": %{z:.4~g}"
    yield go.Heatmap(
        x=columns,
        y=rows,
        z=np.log10(shape.values) if mark.log else shape.values,
        coloraxis=f"coloraxis{axis_suffix(plan.heats[number])}",
        customdata=[
            [": ".join([f"{x[column]}, {y[row]}", *told.get((row, column), ())]) for column in range(len(x))]
            for row in range(len(y))
        ],
        text=[[format(v, form) if np.isfinite(v) else "" for v in row] for row in shape.values] if written else None,
        texttemplate="%{text}" if mark.text is not None else None,
        hovertemplate=f"%{{customdata}}{value}<extra>{escape_tags(mark.label)}</extra>",
        hoverongaps=False,
    )
    up, across = np.nonzero(np.isnan(shape.values))
    pattern = {
        "shape": "/",
        "size": 6,
        "fgcolor": plan.theme.hatch,
        "bgcolor": plan.theme.missing,
        "fillmode": "replace",
    }
    yield go.Bar(
        x=across,
        y=np.ones(len(up)),
        base=up - 0.5,
        width=1,
        marker={"pattern": pattern, "line": {"width": 0}},
        customdata=[f"{x[column]}, {y[row]}" for row, column in zip(up, across, strict=True)],
        hovertemplate="%{customdata}: no value<extra></extra>",
    )


def _trace_words(shape: Words, plan: Plan, number: int) -> Iterator[Any]:
    yield go.Scatter(
        x=shape.x,
        y=shape.y,
        mode="text",
        text=[escape_tags(text) for text in shape.text],
        textfont={"size": NOTE},
        hoverinfo="skip",
        cliponaxis=False,
    )


_MAKERS: dict[type, Callable[[Any, Plan, int], Iterator[Any]]] = {
    Curve: _trace_curve,
    Area: _trace_area,
    Dots: _trace_dots,
    Bars: _trace_bars,
    Cells: _trace_cells,
    Words: _trace_words,
}
