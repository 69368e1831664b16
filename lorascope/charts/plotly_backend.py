"""Charts as interactive plotly figures: frames on a slider, one legend, and the caption below."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from lorascope.charts.axis_limits import Limits
from lorascope.charts.chart import Drawable
from lorascope.charts.figure_plan import Entry, Plan, Ramp, plan
from lorascope.charts.plotly_layout import BAR, BUTTONS, EDGE, FONT, LINE, TITLE, WIDTH, Room, Space, space
from lorascope.charts.plotly_traces import DASHES, SHAPES, axis_suffix, escape_tags, overlays, traces
from lorascope.charts.scales import Scale
from lorascope.charts.theme import fold, theme

STILL: dict[str, Any] = {"frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
CONFIG = {"displaylogo": False, "showSendToCloud": False, "responsive": True}  # no button sends data anywhere
PLAY: dict[str, Any] = {"frame": {"duration": 400, "redraw": True}, "transition": {"duration": 0}}


def figure(drawable: Drawable, name: str | None = None) -> go.Figure:
    """Draw an interactive figure.

    Parameters
    ----------
    drawable : Chart or Panels
        Chart or panels to draw.
    name : str, optional
        Theme, default "light".
    """
    return draw(plan(drawable, theme(name or "light")))


def draw(settled: Plan, width: float = WIDTH) -> go.Figure:
    """Draw a planned figure for a screen ``width`` pixels wide."""
    made = ground(settled, width)
    # Indices of the traces that the slider replaces.
    moving: list[int] = []
    for number, view in enumerate(settled.views):
        start = len(made.data)
        made.add_traces(traces(settled, number, settled.frames[-1] if settled.frames else None))
        if view.panel.chart.frame is not None:
            moving += range(start, len(made.data))
    made.add_traces([_legend_sample(entry, settled) for entry in settled.entries])
    made.add_traces([_bar_sample(number, ramp) for number, ramp in enumerate(settled.ramps)])
    if settled.frames:
        made.frames = [_frame(settled, frame, moving) for frame in settled.frames]
    return made


def ground(settled: Plan, width: float = WIDTH) -> go.Figure:
    """Return a planned figure without traces, for a screen ``width`` pixels wide."""
    return go.Figure(layout=_layout(settled, space(settled, width)))


def fragment(drawable: Drawable, div_id: str, name: str | None = None) -> str:
    """Draw as an HTML fragment that contains plotly.js (4.6 MiB).

    Parameters
    ----------
    drawable : Chart or Panels
        Chart or panels to draw.
    div_id : str
        Id of the fragment, unique on the page.
    name : str, optional
        Theme, default "light".
    """
    made = figure(drawable, name)
    options = {"full_html": False, "auto_play": False, "config": CONFIG, "default_height": f"{made.layout.height}px"}
    return str(made.to_html(include_plotlyjs=True, div_id=div_id, **options))


def bundle(drawable: Drawable) -> dict[str, Any]:
    """Return the MIME bundle for Jupyter: plotly's own for the current front end, else plotly's JSON."""
    made = figure(drawable)
    shown: dict[str, Any] = made._repr_mimebundle_(config=CONFIG)
    return shown or {"application/vnd.plotly.v1+json": {**made.to_plotly_json(), "config": CONFIG}}


def _frame(settled: Plan, frame: Any, moving: list[int]) -> go.Frame:
    """Return the contents of the moving traces in one frame."""
    framed = [number for number, view in enumerate(settled.views) if view.panel.chart.frame is not None]
    data = [trace for number in framed for trace in traces(settled, number, frame)]
    for trace in data:
        if isinstance(trace, go.Heatmap):
            trace.customdata = None  # the names of cells are the same in all frames
    return go.Frame(name=str(frame), data=data, traces=moving)


def _legend_sample(entry: Entry, settled: Plan) -> go.Scatter:
    """Return an empty trace for a legend entry; a click on it hides its whole group."""
    looks: dict[str, dict[str, Any]] = {
        "line": {
            "mode": "lines",
            "line": {"color": entry.color, "dash": DASHES[entry.style % len(DASHES)], "width": 2},
        },
        "dot": {
            "mode": "markers",
            "marker": {"color": entry.color, "symbol": SHAPES[entry.style % len(SHAPES)], "size": 8},
        },
        "patch": {"mode": "markers", "marker": {"color": entry.color, "symbol": "square", "size": 12}},
    }
    return go.Scatter(
        x=[None], y=[None], name=escape_tags(entry.label), legendgroup=entry.group, showlegend=True, **looks[entry.kind]
    )


def _bar_sample(number: int, ramp: Ramp) -> go.Scatter:
    """Return an empty trace, without which plotly omits the color bar."""
    marker = {"color": [ramp.limits[0]], "coloraxis": f"coloraxis{axis_suffix(number)}", "opacity": 0}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False, hoverinfo="skip")


def _layout(settled: Plan, room: Space) -> dict[str, Any]:
    """Return the layout of a figure, which is everything except the traces."""
    look = settled.theme
    layout: dict[str, Any] = {
        "template": "none",
        "height": round(room.height),
        "margin": {"l": room.left, "r": room.right, "t": room.top, "b": room.bottom, "autoexpand": False},
        "paper_bgcolor": look.background,
        "plot_bgcolor": look.background,
        "font": {"color": look.ink, "size": FONT, "family": "Verdana, DejaVu Sans, sans-serif"},
        "barmode": "overlay",
        "hovermode": "closest",
        "title": {
            "text": "<br>".join(map(escape_tags, room.title)),
            "font": {"size": TITLE},
            "x": EDGE / room.width,
            "xanchor": "left",
            "y": 1 - EDGE / room.height,
            "yanchor": "top",
            "yref": "container",
        },
        "legend": {
            "orientation": "h",
            "title": {"text": escape_tags(settled.legend_title)},
            "x": 0,
            "y": 1 - (EDGE + 1.4 * TITLE * len(room.title)) / room.height,
            "yanchor": "top",
            "yref": "container",
            "bgcolor": "rgba(0, 0, 0, 0)",
            "tracegroupgap": 0,
        },
        "annotations": [*_titles(room), *_caption_annotation(settled, room)],
        "shapes": [shape for number in range(len(settled.views)) for shape in overlays(settled, number)],
    }
    for number, view in enumerate(settled.views):
        one, suffix = room.rooms[number], axis_suffix(number)
        for letter, scale, ends, other in (("x", view.panel.x, view.x, "y"), ("y", view.panel.y, view.y, "x")):
            axis = _axis_layout(scale, ends, one, letter, settled)
            layout[f"{letter}axis{suffix}"] = {**axis, "anchor": f"{other}{suffix}"}
    for number in range(len(settled.ramps)):
        layout[f"coloraxis{axis_suffix(number)}"] = _color_axis(settled, room, number)
    if settled.frames:
        layout |= _slider(settled, room)
    return layout


def _axis_layout(scale: Scale, ends: Limits, room: Room, letter: str, settled: Plan) -> dict[str, Any]:
    """Return the layout of one axis of one panel."""
    upright, look = letter == "y", settled.theme
    axis: dict[str, Any] = {
        "domain": room.y if upright else room.x,
        "range": list(np.log10(ends)) if scale.log else list(ends),
        "type": "log" if scale.log else "linear",
        "title": {
            "text": "<br>".join(map(escape_tags, fold(scale.axis.label, 260.0, FONT))),
            "font": {"size": FONT},
            "standoff": 6,
        },
        "showgrid": scale.categories is None,
        "gridcolor": look.grid,
        "zeroline": False,
        "showline": True,
        "linecolor": look.ink,
        "ticks": "outside",
        "ticklen": 4,
        "exponentformat": "power",
        "automargin": False,
    }
    names = room.names[upright]
    if names is not None:
        positions, texts, turned = names
        axis |= {"tickmode": "array", "tickvals": positions, "ticktext": list(map(escape_tags, texts))}
        axis |= {"tickangle": -90 if turned else 0}
    elif scale.whole and not scale.log and abs(ends[1] - ends[0]) < 8:
        axis |= {"dtick": 1}
    if upright and room.shared:
        axis |= {"title": None, "showticklabels": False}
    return axis


def _color_axis(settled: Plan, room: Space, number: int) -> dict[str, Any]:
    """Return a color bar as high as the panels that use it, to the right of the last of them."""
    ramp = settled.ramps[number]
    rooms = [room.rooms[view] for view in ramp.views]
    low, high = min(one.y[0] for one in rooms), max(one.y[1] for one in rooms)
    plot = room.width - room.left - room.right
    beside = [other for other in range(number) if ramp.views[-1] == settled.ramps[other].views[-1]]
    bar = {
        "title": {"text": "<br>".join(map(escape_tags, fold(ramp.label, 200.0, FONT))), "side": "right"},
        "x": max(one.x[1] for one in rooms) + (8 + BAR * len(beside)) / plot,
        "xanchor": "left",
        "y": (low + high) / 2,
        "len": high - low,
        "thickness": 12,
        "xpad": 0,
        "ypad": 0,
        "outlinewidth": 0,
    }
    limits = ramp.limits
    if ramp.log:
        limits = float(np.log10(limits[0])), float(np.log10(limits[1]))
        values = _decades(*limits)
        bar |= {"tickmode": "array", "tickvals": np.log10(values).tolist(), "ticktext": [f"{v:g}" for v in values]}
    scale = [[index / (len(ramp.colors) - 1), color] for index, color in enumerate(ramp.colors)]
    return {"colorscale": scale, "cmin": limits[0], "cmax": limits[1], "colorbar": bar}


def _decades(low: float, high: float) -> list[float]:
    """Return the powers of ten between two exponents; below three decades also twice and five times these."""
    steps = (1, 2, 5) if high - low < 3 else (1,)
    values = [step * 10.0**power for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for step in steps]
    return [value for value in values if low <= np.log10(value) <= high]


def _titles(room: Space) -> list[dict[str, Any]]:
    """Return the titles of panels in a figure with several panels."""
    return [
        {
            "text": "<br>".join(map(escape_tags, one.title)),
            "showarrow": False,
            "align": "left",
            "font": {"size": FONT},
            "x": one.x[0],
            "xref": "paper",
            "xanchor": "left",
            "y": one.y[1],
            "yref": "paper",
            "yanchor": "bottom",
        }
        for one in room.rooms
        if one.title
    ]


def _caption_annotation(settled: Plan, room: Space) -> list[dict[str, Any]]:
    """Return the caption at the bottom of the figure."""
    if not room.caption:
        return []
    note = {
        "text": "<br>".join(map(escape_tags, room.caption)),
        "showarrow": False,
        "align": "left",
        "font": {"size": 0.92 * FONT},
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "xshift": EDGE - room.left,
        "y": 0,
        "yref": "paper",
        "yanchor": "top",
        "yshift": -(room.bottom - EDGE - LINE * len(room.caption)),
    }
    return [note]


def _slider(settled: Plan, room: Space) -> dict[str, Any]:
    """Return the slider over the frames and the button that plays them."""
    steps = [
        {"label": escape_tags(str(frame)), "method": "animate", "args": [[str(frame)], {"mode": "immediate", **STILL}]}
        for frame in settled.frames
    ]
    place: dict[str, Any] = {"y": 0, "yanchor": "top", "xanchor": "left"}
    start = BUTTONS / (room.width - room.left - room.right)
    look = settled.theme
    colors = {"bgcolor": look.missing, "bordercolor": look.hatch}
    play = {"label": "▶", "method": "animate", "args": [None, {"mode": "immediate", "fromcurrent": True, **PLAY}]}
    pause = {"label": "❚❚", "method": "animate", "args": [[None], {"mode": "immediate", **STILL}]}
    slider = {
        "steps": steps,
        # The slider opens at the last frame, which shows the result; playing from there restarts it.
        "active": len(steps) - 1,
        "currentvalue": {"prefix": f"{escape_tags(settled.frame_label)} ", "xanchor": "left"},
        "x": start,
        "len": 1 - start,
        "pad": {"t": room.foot + 4},
        "activebgcolor": look.hatch,
        "tickcolor": look.ink,
        **place,
        **colors,
    }
    buttons = {"type": "buttons", "direction": "left", "buttons": [play, pause], "x": 0, "pad": {"t": room.foot + 22}}
    return {"sliders": [slider], "updatemenus": [{**buttons, **place, **colors, "showactive": False}]}
