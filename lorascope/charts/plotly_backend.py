"""Charts as interactive plotly figures: frames on a slider, one legend, and the caption below."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lorascope.charts.chart import Drawable
from lorascope.charts.figure_plan import Entry, FigurePlan, plan_figure
from lorascope.charts.figure_style import Palette, figure_theme
from lorascope.charts.geometry import Area, Bars, Cells, Curve, Dots, Errors, Numbers, Panel, Shape, Words
from lorascope.charts.plotly_layout import NOTE, WIDTH, add_opacity, axis_suffix, escape_tags, layout, math_to_tags
from lorascope.charts.text_wrapping import GLYPH
from lorascope.charts.theme import FAINT, MUTED, Theme, readable_ink

NARROW = 358.0  # pixels: width of a figure on a phone
# Plotly keeps the data and the frames.
_ARRANGE = """
const chart = document.getElementById("{plot_id}"), phone = matchMedia("(max-width: 47rem)");
const wide = chart.layout, narrow = NARROW_LAYOUT;
const arrange = () => {
  const layout = phone.matches ? narrow : wide;
  chart.style.height = `${layout.height}px`;
  Plotly.react(chart, chart.data, layout);
};
phone.addEventListener("change", arrange);
if (phone.matches) arrange();
"""
DOT = 7.0  # diameter of a dot in pixels
LARGEST = 18.0  # diameter in pixels of the largest dot, if the area shows a column
CONFIG = {"displaylogo": False, "showSendToCloud": False, "responsive": True}  # no button sends data anywhere


def to_plotly(
    drawable: Drawable,
    name: str | None = None,
    title: str | None = None,
    caption: bool = True,
    legend: bool = True,
    palette: Palette | None = None,
) -> go.Figure:
    """Draw an interactive plotly figure in a theme, "light" by default; see :meth:`Drawable.mpl`."""
    return draw(plan_figure(drawable, figure_theme(name, "light", palette), title, caption, legend))


def draw(settled: FigurePlan, width: float = WIDTH) -> go.Figure:
    """Draw a planned figure with plotly for a screen ``width`` pixels wide."""
    drawn_figure = ground(settled, width)
    framed = [panel for panel in settled.panels if panel.chart.frame is not None]
    # Indices of the traces that the slider replaces.
    moving: list[int] = []
    for panel in settled.panels:
        start = len(drawn_figure.data)
        # The slider opens at the last frame.
        drawn_figure.add_traces(traces(panel, (settled.frames or [None])[-1]))
        for trace in drawn_figure.data[start:]:
            _size_texts(trace, panel, drawn_figure.layout, width)
        if panel in framed:
            moving += range(start, len(drawn_figure.data))
    drawn_figure.add_traces([_legend_sample(entry, settled.theme) for entry in settled.entries])
    for ramp in settled.ramps:
        # Without a trace, plotly omits the color bar.
        marker = {"color": [ramp.limits[0]], "coloraxis": f"coloraxis{axis_suffix(ramp.number)}", "opacity": 0}
        drawn_figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False, hoverinfo="skip")
    frames = []
    for frame in settled.frames:
        data: list[Any] = []
        for panel in framed:
            of_panel = traces(panel, frame)
            for trace in of_panel:
                _size_texts(trace, panel, drawn_figure.layout, width)
            data += of_panel
        for trace in data:
            if isinstance(trace, go.Heatmap):
                trace.customdata = None  # the names of cells are the same in all frames
        frames.append(go.Frame(name=escape_tags(str(frame)), data=data, traces=moving))
    drawn_figure.frames = frames
    return drawn_figure


def _size_texts(trace: Any, panel: Panel, settings: Any, width: float) -> None:
    """Set the size of the numbers in cells, for which plotly would also count the letters of their tags."""
    if not isinstance(trace, go.Heatmap) or trace.texttemplate is None or not np.size(trace.z):
        return
    suffix, margin = axis_suffix(panel.number), settings.margin
    (left, right), (bottom, top) = settings[f"xaxis{suffix}"].domain, settings[f"yaxis{suffix}"].domain
    rows, columns = np.shape(trace.z)
    longest = max(len(re.sub("<[^>]*>", "", text)) for row in trace.text for text in row)
    across = (right - left) * (width - margin.l - margin.r) / columns / (GLYPH * max(longest, 1))
    up = 0.7 * (top - bottom) * (settings.height - margin.t - margin.b) / rows
    trace.textfont.size = max(1.0, min(NOTE, across, up))


def ground(settled: FigurePlan, width: float = WIDTH) -> go.Figure:
    """Return a planned plotly figure without traces, for a screen ``width`` pixels wide."""
    return go.Figure(layout=layout(settled, width))


def narrow_layout(settled: FigurePlan) -> dict[str, Any]:
    """Return the layout of a planned plotly figure on a phone, as JSON values: its panels are stacked."""
    stacked = replace(settled, rows=[[view] for view in range(len(settled.panels))])
    return dict(json.loads(ground(stacked, NARROW).to_json())["layout"])


def fragment(
    drawable: Drawable,
    div_id: str,
    look: Theme,
    plotly_js: str | bool,
    title: str | None,
    caption: bool,
    legend: bool,
) -> str:
    """Draw as an HTML fragment with its layout for a phone; ``div_id`` must be unique on the page.

    ``plotly_js`` is True to contain plotly.js (4.6 MiB), "cdn", or the name of its file.
    """
    settled = plan_figure(drawable, look, title, caption, legend)
    drawn_figure = draw(settled)
    narrow = json.dumps({**narrow_layout(settled), "dragmode": False}).replace("<", "\\u003c")
    options = {
        "full_html": False,
        "auto_play": False,
        "config": CONFIG,
        "default_height": f"{drawn_figure.layout.height}px",
        "post_script": _ARRANGE.replace("NARROW_LAYOUT", narrow),
    }
    return str(drawn_figure.to_html(include_plotlyjs=plotly_js, div_id=div_id, **options))


def bundle(drawable: Drawable) -> dict[str, Any]:
    """Return the MIME bundle for Jupyter: plotly's own for the current front end, else plotly's JSON."""
    drawn_figure = to_plotly(drawable)
    mime_bundle: dict[str, Any] = drawn_figure._repr_mimebundle_(config=CONFIG)
    return mime_bundle or {"application/vnd.plotly.v1+json": {**drawn_figure.to_plotly_json(), "config": CONFIG}}


def _legend_sample(entry: Entry, theme: Theme) -> Any:
    """Return an empty trace for a legend entry; a click on it hides its whole group."""
    fields = {"name": math_to_tags(entry.label), "legendgroup": escape_tags(entry.group), "showlegend": True}
    if entry.kind == "patch":
        return go.Bar(x=[None], y=[None], marker=_fill(entry.color, entry.style, theme), **fields)
    if entry.kind == "band":
        return go.Bar(x=[None], y=[None], marker={"color": add_opacity(entry.color, FAINT)}, **fields)
    mode = "markers"
    shape: str | None = entry.style
    dash: str | None = None
    if entry.kind == "line":
        mode, shape, dash = "lines+markers" if entry.marker else "lines", entry.marker or None, entry.style
    marker: dict[str, Any] = {"color": entry.color, "symbol": shape, "size": 8}
    line: dict[str, Any] = {"color": entry.color, "dash": dash, "width": 2}
    return go.Scatter(x=[None], y=[None], mode=mode, marker=marker, line=line, **fields)


def _fill(color: str, hatch: str, theme: Theme) -> dict[str, Any]:
    """Return the marker of bars, whose hatch distinguishes them in gray."""
    pattern = {"shape": hatch, "size": 6, "solidity": 0.15, "fgcolor": theme.background, "fillmode": "overlay"}
    return {"color": color, "line": {"color": theme.background, "width": 0.5}, "pattern": pattern if hatch else {}}


def traces(panel: Panel, frame: Any = None) -> list[Any]:
    """Return the plotly traces of a panel in one frame, without rules (see :func:`overlays`)."""
    suffix = axis_suffix(panel.number)
    panel_traces: list[Any] = []
    for shape in panel.shapes(frame):
        for trace in _make_traces(shape, panel):
            panel_traces.append(trace.update(xaxis=f"x{suffix}", yaxis=f"y{suffix}", showlegend=False))
    return panel_traces


def _group_fields(panel: Panel, group: str, x: Numbers, y: Numbers, spelled: str = "") -> dict[str, Any]:
    """Return legend group and text at the pointer: names on a categorical axis, and the axis ``spelled`` as text."""
    lines: list[str] = []
    texts: list[list[str]] = []
    for letter, scale, values in (("x", panel.x, x), ("y", panel.y, y)):
        placeholder = f"%{{customdata[{len(texts)}]}}"
        if scale.categories is not None:
            texts.append(list(map(math_to_tags, scale.nearest_names(values))))
        elif letter == spelled:
            texts.append([f"{value:.4g}" for value in values])
        else:
            placeholder = f"%{{{letter}:.4~g}}"
        lines.append(f"{math_to_tags(scale.axis.label) or letter}: {placeholder}")
    template = "<br>".join(lines) + f"<extra>{math_to_tags(group)}</extra>"
    custom = list(map(list, zip(*texts, strict=True))) or None
    return {"legendgroup": escape_tags(group), "hovertemplate": template, "customdata": custom}


def _error_fields(errors: Errors | None, value: Numbers, panel: Panel) -> dict[str, Any]:
    """Return error bars as distances from the value and in one color, as plotly expects."""
    if errors is None:
        return {}
    color = panel.theme.ink
    if len(set(errors.colors)) == 1:
        color = errors.colors[0]
    reach = {"array": errors.high - value, "arrayminus": value - errors.low}
    look = {"type": "data", "symmetric": False, "color": color, "thickness": 1.3, "width": 0}
    return {"error_x" if errors.lying else "error_y": {**reach, **look}}


def _make_traces(shape: Shape, panel: Panel) -> Iterator[Any]:
    look: dict[str, Any]
    match shape:
        case Curve():
            width = 1 if shape.thin else 2
            look = {"mode": "lines", "line": {"color": shape.color, "width": width, "dash": shape.dash}}
            yield go.Scatter(x=shape.x, y=shape.y, **look, **_group_fields(panel, shape.group, shape.x, shape.y))
        case Area():
            # The outline of each stretch without gaps, separated by NaN.
            is_finite = np.isfinite(shape.x + shape.low + shape.high)
            xs, ys = [], []
            for start in np.flatnonzero(np.diff(is_finite.astype(int), prepend=0) == 1):
                stretch = slice(start, start + int(np.argmin([*is_finite[start:], False])))
                xs += [*shape.x[stretch], *shape.x[stretch][::-1], np.nan]
                ys += [*shape.high[stretch], *shape.low[stretch][::-1], np.nan]
            outline = {"x": np.array(xs[:-1], float), "y": np.array(ys[:-1], float), "line": {"width": 0}}
            look = {"fill": "toself", "fillcolor": add_opacity(shape.color, FAINT), "hoverinfo": "skip"}
            yield go.Scatter(mode="lines", legendgroup=escape_tags(shape.group), **outline, **look)
        case Dots():
            size: Any = DOT
            if shape.share is not None:
                size = LARGEST * np.sqrt(shape.share)  # the diameter
            look = {"color": shape.colors, "size": size, "symbol": shape.symbol, "opacity": 1}
            edge = {"color": panel.theme.background, "width": 0.5}
            if shape.symbol.endswith("-open"):  # it consists of its edge
                edge = {"width": 1.5}
            look = {"mode": "markers", "marker": {**look, "line": edge}}
            errors = _error_fields(shape.errors, shape.x if panel.chart.is_lying else shape.y, panel)
            fields = _group_fields(panel, shape.group, shape.x, shape.y)
            yield go.Scatter(x=shape.x, y=shape.y, **look, **errors, **fields)
        case Bars():
            x, y, spelled, orientation = shape.position, shape.top - shape.base, "y", "v"
            if shape.lying:
                x, y, spelled, orientation = y, x, "x", "h"
            base: Any = shape.base
            if getattr(panel, spelled).log:  # it has no zero to start from
                base = None
            look = {"width": shape.width, "marker": _fill(shape.color, shape.hatch, panel.theme)}
            errors = _error_fields(shape.errors, shape.top, panel)
            fields = _group_fields(panel, shape.group, x, y, spelled)  # plotly would show the top, not the length
            yield go.Bar(x=x, y=y, base=base, orientation=orientation, **look, **errors, **fields)
        case Cells():
            yield from _heat_traces(shape, panel)
        case Words():
            look = {
                "mode": "text",
                "textfont": {"size": NOTE},
                "opacity": MUTED if shape.muted else 1,
                "hoverinfo": "skip",
                "cliponaxis": False,
            }
            yield go.Scatter(x=shape.x, y=shape.y, text=list(map(escape_tags, shape.text)), **look)


def _heat_traces(shape: Cells, panel: Panel) -> Iterator[Any]:
    """Yield the cells, and hatched ones for missing values."""
    mark, (rows, columns) = shape.mark, shape.values.shape
    x_names = list(map(math_to_tags, panel.x.names))
    cell_names = []
    for y_name in map(math_to_tags, panel.y.names):
        cell_names.append([f"{x_name}, {y_name}" for x_name in x_names])
    labels = list(map(list, cell_names))
    for (row, column), words in shape.words.items():
        labels[row][column] += f": {escape_tags(words)}"
    value, written = ": %{z:.4~g}", {}
    if mark.text is not None:
        texts = [[""] * columns for _ in range(rows)]
        for (row, column), text in shape.texts.items():
            # Plotly's own choice between white and gray has a contrast of 2.5 on some colors.
            ink = readable_ink(shape.ramp.color_of(shape.values[row, column]))
            texts[row][column] = f'<span style="color:{ink}">{text}</span>'
        value, written = f": %{{z:{mark.text}}}", {"text": texts, "texttemplate": "%{text}"}
    if shape.words:  # the labels end in them
        value = ""
    yield go.Heatmap(
        x=list(map(float, range(columns))),
        y=list(map(float, range(rows))),
        z=shape.values,
        coloraxis=f"coloraxis{axis_suffix(shape.ramp.number)}",
        customdata=labels,
        hovertemplate=f"%{{customdata}}{value}<extra>{math_to_tags(mark.label)}</extra>",
        hoverongaps=False,
        **written,
    )
    up, across = np.nonzero(np.isnan(shape.values))
    colors = {"fgcolor": panel.theme.hatch, "bgcolor": panel.theme.missing}
    yield go.Bar(
        x=across,
        y=np.ones(len(up)),
        base=up - 0.5,
        width=1,
        marker={"pattern": {"shape": "/", "size": 6, "fillmode": "replace", **colors}, "line": {"width": 0}},
        customdata=[cell_names[row][column] for row, column in zip(up, across, strict=True)],
        hovertemplate="%{customdata}: no value<extra></extra>",
    )
