"""Layout in pixels: positions of the panels of an interactive figure and of everything around them.

Plotly measures some positions in fractions of the plot and others in pixels. This module computes all of them in pixels
for a figure of fixed width. On a wider screen the panels widen, and the space around them remains sufficient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import chain, pairwise, product
from typing import Any

import numpy as np

from lorascope.charts.figure_plan import FigurePlan
from lorascope.charts.geometry import Panel, Ruler
from lorascope.charts.math_text import replace_math, tags_of_math
from lorascope.charts.scales import Limits, Ramp, Scale, Ticks
from lorascope.charts.text_wrapping import GLYPH, count_lines, cut_name, wrap_text
from lorascope.charts.theme import channels
from lorascope.files.printable import printable_lines, short_name

WIDTH, EDGE, GAP = 760.0, 14.0, 14.0  # default width of a figure, distance from its edges, distance of panels
FONT, TITLE, SMALL, NOTE = 12.0, 15.0, 0.92 * 12.0, 11  # font sizes; the last of text inside a panel
PANEL, ROW = 290.0, 22.0  # height of a panel, and of a row with a name
TICKS, LINE, ENTRY = 24.0, 18.0, 19.0  # height of tick labels, of a line of text, and of a line of the legend
NUMBERS = 42.0  # width of the numbers on a vertical axis
TOOLS = 22.0  # height of plotly's own buttons at the top, which cover text
SLIDER, BAR = 90.0, 88.0  # height of the slider, width of a color bar with its title
SMALLEST = 8.0  # font size of names that have to be cut
NAMES = 0.3  # of the width of a figure: most room for the names on a vertical axis
SAMPLE = 48.0  # width of an entry of the legend without its text
BUTTONS = 100.0  # width of the buttons to the left of the slider
COLOR_BAR: dict[str, Any] = {"xanchor": "left", "thickness": 12, "xpad": 0, "ypad": 0, "outlinewidth": 0}
PAPER: dict[str, Any] = {"showarrow": False, "align": "left", "xref": "paper", "xanchor": "left", "yref": "paper"}


@dataclass(frozen=True)
class _Space:
    """Positions of the panels and margins around them.

    For each panel, ``domains`` has its fractions of the plot on "x" and "y", and ``ticks`` the ticks of its axes. The
    left neighbors of the panels in ``shared`` show their y. ``foot`` is the height of the lowest tick labels and their
    axis label.
    """

    width: float
    plot: float
    height: float
    margin: dict[str, float]
    foot: float
    domains: list[dict[str, Limits]]
    ticks: list[dict[str, Ticks | None]]
    shared: set[int]
    titles: list[str]
    title: str
    caption: str


def layout(settled: FigurePlan, width: float = WIDTH) -> dict[str, Any]:
    """Return the plotly layout of a figure ``width`` pixels wide, which is everything except the traces."""
    look, room = settled.theme, _measure(settled, width)
    top: dict[str, Any] = {"yanchor": "top", "yref": "container"}
    head = {"x": EDGE / room.width, "xanchor": "left", "y": 1 - EDGE / room.height, **top}
    below = 1 - (EDGE + 1.4 * TITLE * count_lines(room.title)) / room.height
    legend = {"x": 0, "y": below, "bgcolor": "rgba(0, 0, 0, 0)", "tracegroupgap": 0, **top}
    longest = max((len(entry.label) for entry in settled.entries), default=0)
    if SAMPLE + GLYPH * FONT * longest > room.plot:  # it needs the whole width
        fitting_size = (room.width - 2 * EDGE - SAMPLE) / (GLYPH * longest)
        legend |= {"x": EDGE / room.width, "xref": "container", "font": {"size": min(FONT, fitting_size)}}
    annotations = []
    for text, domain in zip(room.titles, room.domains, strict=True):
        if text:
            position = {"x": domain["x"][0], "y": domain["y"][1], "yanchor": "bottom"}
            annotations.append({**PAPER, **_sized_text(text, FONT), **position})
    if room.caption:
        below = -(room.margin["b"] - EDGE - LINE * count_lines(room.caption))
        position = {"x": 0, "xshift": EDGE - room.margin["l"], "y": 0, "yanchor": "top", "yshift": below}
        # It contains names from data.
        annotations.append({**PAPER, "text": escape_tags(room.caption), "font": {"size": SMALL}, **position})
    figure_layout: dict[str, Any] = {
        "template": "none",
        "height": round(room.height),
        "margin": {**room.margin, "autoexpand": False},
        "paper_bgcolor": look.background,
        "plot_bgcolor": look.background,
        "font": {"color": look.ink, "size": FONT, "family": "Verdana, DejaVu Sans, sans-serif"},
        "barmode": "overlay",
        "hovermode": "closest",
        "title": {**_sized_text(room.title, TITLE), **head},
        "legend": {"title": {"text": math_to_tags(settled.legend_title)}, "orientation": "h", **legend},
        "annotations": annotations,
        "shapes": list(chain.from_iterable(map(overlays, settled.panels))),
    }
    for panel in settled.panels:
        suffix = axis_suffix(panel.number)
        for letter, other in ("xy", "yx"):
            figure_layout[f"{letter}axis{suffix}"] = {**_axis_layout(panel, letter, room), "anchor": f"{other}{suffix}"}
    for ramp in settled.ramps:
        figure_layout[f"coloraxis{axis_suffix(ramp.number)}"] = _color_axis(ramp, settled.ramps, room)
    if settled.frames:
        figure_layout |= _slider(settled, room)
    return figure_layout


def _sized_text(text: str, size: float) -> dict[str, Any]:
    return {"text": math_to_tags(text), "font": {"size": size}}


def _measure(settled: FigurePlan, width: float) -> _Space:
    """Compute margins, and the room of each panel."""
    panels, rows = settled.panels, settled.rows
    shared, before = set(), [_names_width(panel.y, NAMES * width) for panel in panels]
    for view, neighbor in chain.from_iterable(map(pairwise, rows)):
        if panels[view].y == panels[neighbor].y:
            shared.add(neighbor)
            before[neighbor] = GAP
    # A color bar is to the right of the last panel in a row that uses it.
    after = [0.0] * len(panels)
    for members, ramp in product(rows, settled.ramps):
        if views := set(members).intersection(ramp.views):
            after[max(views)] += BAR
    left, right = EDGE + max(before[row[0]] for row in rows), EDGE + max(after[row[-1]] for row in rows)
    plot = width - left - right
    starts: list[float] = []
    widths: list[float] = []
    units: list[float] = []
    for members in rows:
        lost = sum(after[view] + GAP for view in members[:-1]) + sum(before[view] for view in members[1:])
        spans = [panels[view].chart.span for view in members]
        unit = (plot - lost) / sum(spans)
        if sum(spans) < settled.columns:
            unit = min([unit, *units])  # as in the full rows
        units.append(unit)
        start = -before[members[0]]  # the names of the first panel are in the margin
        for view, span in zip(members, spans, strict=True):
            start += before[view]
            starts.append(start)
            widths.append(span * unit)
            start += widths[view] + after[view] + GAP
    below: list[Ticks | None] = []
    titles = [""] * len(panels)
    depths, heads, heights, tops = [0.0] * len(rows), [0.0] * len(rows), [0.0] * len(rows), []
    for row, members in enumerate(rows):
        for view in members:
            x, y = panels[view].x, panels[view].y
            if len(panels) > 1:
                titles[view] = wrap_text(panels[view].chart.title, widths[view], FONT)
            below.append(x.ticks(widths[view], FONT, across=False))
            depths[row] = max(depths[row], _depth(x, below[view], widths[view]))
            heads[row] = max(heads[row], LINE * count_lines(titles[view]))
            height = y.height(PANEL, ROW * len(y.names), 1.3 * PANEL, 0.5 * PANEL)
            if panels[view].chart.square:
                height = min(height, widths[view])
            heights[row] = max(heights[row], height)
        # Titles of the first row are above the plot.
        tops.append(sum(heights[:row]) + sum(depths[:row]) + sum(heads[1 : row + 1]))
    inner = tops[-1] + heights[-1]
    title = wrap_text(settled.title, width - 2 * EDGE, TITLE)
    caption = wrap_text(settled.caption, width - 2 * EDGE, SMALL)
    top = EDGE + max(1.4 * TITLE * count_lines(title) + _legend_height(settled, plot), TOOLS) + heads[0]
    bottom = depths[-1] + SLIDER * bool(settled.frames) + LINE * count_lines(caption) + EDGE
    margin = {"l": left, "r": right, "t": top, "b": bottom}
    domains, ticks = [], []
    for row, members in enumerate(rows):
        for view in members:
            side = widths[view]
            low, high = 1 - (tops[row] + heights[row]) / inner, 1 - tops[row] / inner
            if panels[view].chart.square:
                side = min(side, heights[row])
                low = max(high - side / inner, low)
            stop = min((starts[view] + side) / plot, 1.0)  # rounding may exceed 1
            domains.append({"x": (starts[view] / plot, stop), "y": (low, high)})
            names = panels[view].y.ticks(heights[row], FONT, across=True)
            if names is not None:
                names = names._replace(names=[cut_name(name, NAMES * width, SMALLEST) for name in names.names])
            ticks.append({"x": below[view], "y": names})
    height = top + inner + bottom
    return _Space(width, plot, height, margin, depths[-1], domains, ticks, shared, titles, title, caption)


def _names_width(scale: Scale, max_width: float) -> float:
    """Return the width of the names, up to ``max_width``, and of the label to the left of a panel."""
    names = scale.names
    if scale.axis.ticks is not None:
        names = list(map(short_name, scale.axis.ticks.values()))
    width = max(NUMBERS, min(GLYPH * FONT * max(map(len, names), default=0), max_width) + 10)
    if scale.axis.label:
        width += LINE + 4
    return width


def _depth(scale: Scale, ticks: Ticks | None, width: float) -> float:
    """Return the height of the names and the label below a panel."""
    names = TICKS
    if ticks is not None and ticks.turned:
        names = GLYPH * FONT * max(map(len, ticks.names)) + 10
    return names + LINE * count_lines(wrap_text(scale.axis.label, width, FONT)) + 6


def _legend_height(settled: FigurePlan, plot: float) -> float:
    """Return the height of the legend; plotly uses columns of the widest entry if one line is too short."""
    widths = [GLYPH * FONT * len(entry.label) + SAMPLE for entry in settled.entries]
    if not widths:
        return 0.0
    room = plot - GLYPH * FONT * len(settled.legend_title)
    lines = 1
    if sum(widths) > room:
        lines = math.ceil(len(widths) / max(1, room // max(widths)))
    return ENTRY * lines + 14


def _axis_layout(panel: Panel, letter: str, room: _Space) -> dict[str, Any]:
    """Return the layout of the axis "x" or "y" of a panel."""
    scale: Scale = getattr(panel, letter)
    kind, ends = "linear", list(scale.limits)
    if scale.log:
        kind, ends = "log", list(np.log10(scale.limits))  # plotly states its ends as exponents
    title = {**_sized_text(wrap_text(scale.axis.label, 260.0, FONT), FONT), "standoff": 6}
    line = {"showline": True, "linecolor": panel.theme.ink, "ticks": "outside", "ticklen": 4, "exponentformat": "power"}
    grid = {"showgrid": scale.categories is None, "gridcolor": panel.theme.grid, "zeroline": False}
    extent = {"type": kind, "domain": room.domains[panel.number][letter], "range": ends}
    axis = {"title": title, "automargin": False, **extent, **line, **grid}
    ticks = room.ticks[panel.number][letter]
    if ticks is not None:
        names = list(map(math_to_tags, ticks.names))
        axis |= {"tickmode": "array", "tickvals": ticks.positions, "ticktext": names}
        axis |= {"tickangle": -90 if ticks.turned else 0}
        longest = max(map(len, ticks.names), default=0)
        if letter == "y" and GLYPH * FONT * longest > NAMES * room.width:
            axis["tickfont"] = {"size": NAMES * room.width / (GLYPH * longest)}
    elif scale.is_integer and not scale.log and abs(scale.limits[1] - scale.limits[0]) < 8:
        axis |= {"dtick": 1}
    if letter == "y" and panel.number in room.shared:
        axis |= {"title": None, "showticklabels": False}
    return axis


def _color_axis(ramp: Ramp, ramps: list[Ramp], room: _Space) -> dict[str, Any]:
    """Return a color bar as high as the panels that use it, to the right of the last of them."""
    right, low, high = 0.0, 1.0, 0.0
    for view in ramp.views:
        domain = room.domains[view]
        right, low, high = max(right, domain["x"][1]), min(low, domain["y"][0]), max(high, domain["y"][1])
    beside = sum(other.views[-1] == ramp.views[-1] for other in ramps[: ramp.number])
    bar = {
        "title": {"text": math_to_tags(wrap_text(ramp.label, 200.0, FONT)), "side": "right"},
        "x": right + (8 + BAR * beside) / room.plot,
        "y": (low + high) / 2,
        "len": high - low,
        **COLOR_BAR,
    }
    colors = [[index / (len(ramp.colors) - 1), color] for index, color in enumerate(ramp.colors)]
    return {"colorscale": colors, "cmin": ramp.limits[0], "cmax": ramp.limits[1], "colorbar": bar}


def _slider(settled: FigurePlan, room: _Space) -> dict[str, Any]:
    """Return the slider over the frames and the button that plays them."""
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    play = {**still, "frame": {"duration": 400, "redraw": True}, "fromcurrent": True}
    names = map(escape_tags, map(str, settled.frames))
    steps = [{"label": name, "method": "animate", "args": [[name], still]} for name in names]
    look, start = settled.theme, BUTTONS / room.plot
    if room.plot < 2 * BUTTONS:  # on a phone, names and color bars may leave room for the slider only
        start = 0.0
    common = {"y": 0, "yanchor": "top", "xanchor": "left", "bgcolor": look.missing, "bordercolor": look.hatch}
    # The slider opens at the last frame, which shows the result; playing from there restarts it.
    slider = {"steps": steps, "active": len(steps) - 1, "x": start, "len": 1 - start, "pad": {"t": room.foot + 4}}
    value = {"prefix": f"{escape_tags(settled.frame_label)} ", "xanchor": "left"}
    slider |= {"currentvalue": value, "activebgcolor": look.hatch, "tickcolor": look.ink}
    buttons = [
        {"label": "▶", "method": "animate", "args": [None, play]},
        {"label": "❚❚", "method": "animate", "args": [[None], still]},
    ]
    position = {"type": "buttons", "direction": "left", "x": 0, "pad": {"t": room.foot + 22}, "showactive": False}
    menus = [{"buttons": buttons, **position, **common}]
    return {"sliders": [slider | common], "updatemenus": menus[: bool(start)]}


def overlays(panel: Panel) -> list[dict[str, Any]]:
    """Return the rules of a panel as shapes of the plotly layout; they are the same in every frame."""
    rules, suffix = [], axis_suffix(panel.number)
    for shape in panel.shapes():
        if isinstance(shape, Ruler):
            label = {**_sized_text(shape.label, NOTE), "textposition": "end", "xanchor": "right"}
            line = {"color": panel.theme.ink, "width": 1, "dash": "dash"}
            look: dict[str, Any] = {"type": "line", "line": line, "label": label}
            for letter, position in (("x", shape.x), ("y", shape.y)):
                start, stop, axis = position, position, f"{letter}{suffix}"
                if position is None:  # the rule spans the axis
                    start, stop, axis = 0, 1, f"{axis} domain"
                look |= {f"{letter}0": start, f"{letter}1": stop, f"{letter}ref": axis}
            rules.append(look)
    return rules


def axis_suffix(number: int) -> str:
    """Return the suffix of an axis in a plotly layout: x, x2, x3, ..."""
    if number == 0:
        return ""
    return str(number + 1)


def escape_tags(text: str) -> str:
    """Escape text in a plotly layout: plotly must not interpret tags, math or placeholders in it."""
    inert = escape(printable_lines(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")
    return inert.replace("\n", "<br>")


def math_to_tags(text: str) -> str:
    """Escape text that an author wrote: math gets tags that plotly draws, since MathJax would need a network."""
    return replace_math(printable_lines(text), escape_tags, tags_of_math)


def add_opacity(color: str, opacity: float) -> str:
    """Return a color with an opacity for a plotly layout."""
    return f"rgba({', '.join(map(str, channels(color)))}, {opacity})"
