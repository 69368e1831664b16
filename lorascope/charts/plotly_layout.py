"""Layout in pixels: positions of the panels of an interactive figure and of everything around them.

Plotly measures some positions in fractions of the plot and others in pixels. This module computes all of them in pixels
for a figure of fixed width. On a wider screen the panels widen, and the space around them remains sufficient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from lorascope.charts.axis_limits import Limits
from lorascope.charts.figure_plan import Plan
from lorascope.charts.scales import Scale
from lorascope.charts.theme import GLYPH, fold
from lorascope.files.printable import short_name

WIDTH, EDGE, GAP = 760.0, 14.0, 14.0  # default width of a figure, distance from its edges, distance of panels
FONT, TITLE = 12.0, 15.0  # font sizes
PANEL, ROW = 290.0, 22.0  # height of a panel, and of a row with a name
TICKS, LINE = 24.0, 18.0  # height of tick labels, and of a line of text
NUMBERS = 42.0  # width of the numbers on a vertical axis
TOOLS = 22.0  # height of plotly's own buttons at the top, which cover text
SLIDER, BAR = 90.0, 88.0  # height of the slider, width of a color bar with its title
BUTTONS = 100.0  # width of the buttons to the left of the slider

Ticks = tuple[list[float], list[str], bool]


@dataclass(frozen=True)
class Room:
    """One panel: its fractions of the plot, title lines and names, and whether its left neighbor shows its y."""

    x: Limits
    y: Limits
    title: list[str]
    names: tuple[Ticks | None, Ticks | None]
    shared: bool


@dataclass(frozen=True)
class Space:
    """Margins around the plot; ``foot`` is the height of its lowest tick labels and their axis label."""

    width: float
    rooms: list[Room]
    left: float
    right: float
    top: float
    bottom: float
    foot: float
    height: float
    title: list[str]
    caption: list[str]


def space(settled: Plan, width: float = WIDTH) -> Space:
    """Compute the layout of a figure."""
    views, rows, order = settled.views, settled.rows, range(len(settled.views))
    shared = {
        new for row in rows for old, new in pairwise(row) if views[old].y == views[new].y and
        views[old].panel.y == views[new].panel.y
    }  # fmt: skip
    before = [GAP if view in shared else _names_width(views[view].panel.y) for view in order]
    after = [BAR * _count_color_bars(settled, row, view) for row in rows for view in row]
    left, right = EDGE + max(before[row[0]] for row in rows), EDGE + max(after[row[-1]] for row in rows)
    plot = width - left - right
    lost = [sum(after[view] + GAP for view in row[:-1]) + sum(before[view] for view in row[1:]) for row in rows]
    widths = [(plot - lost[number]) / len(row) for number, row in enumerate(rows) for _ in row]
    starts = [
        sum(widths[other] + after[other] + GAP + before[row[column + 1]] for column, other in enumerate(row[:index]))
        for row in rows
        for index in range(len(row))
    ]
    below = [_ticks(views[view].panel.x, widths[view], False) for view in order]
    depths = [max(_depth(views[view].panel.x, below[view], widths[view]) for view in row) for row in rows]
    titles = [fold(views[view].panel.chart.title, widths[view], FONT) if len(views) > 1 else [] for view in order]
    heads = [max(LINE * len(titles[view]) for view in row) for row in rows]
    heights = [max(_panel_height(views[view].panel.y) for view in row) for row in rows]
    tops = [sum(heights[:n]) + sum(depths[:n]) + sum(heads[1 : n + 1]) for n in range(len(rows))]
    inner = tops[-1] + heights[-1]
    title = fold(settled.title, width - 2 * EDGE, TITLE) if settled.title else []
    caption = fold(settled.caption, width - 2 * EDGE, 0.92 * FONT) if settled.caption else []
    top = EDGE + max(1.4 * TITLE * len(title) + _legend_height(settled, plot), TOOLS) + heads[0]
    bottom = depths[-1] + (SLIDER if settled.frames else 0.0) + LINE * len(caption) + EDGE
    rooms = [
        Room(
            (starts[view] / plot, min((starts[view] + widths[view]) / plot, 1.0)),  # rounding may exceed 1
            (1 - (tops[row] + heights[row]) / inner, 1 - tops[row] / inner),
            titles[view],
            (below[view], _ticks(views[view].panel.y, heights[row], True)),
            view in shared,
        )
        for row, members in enumerate(rows)
        for view in members
    ]
    return Space(width, rooms, left, right, top, bottom, depths[-1], top + inner + bottom, title, caption)


def _ticks(scale: Scale, room: float, across: bool) -> Ticks | None:
    """Return the names on an axis; None if plotly chooses its numbers."""
    return None if scale.categories is None and scale.axis.ticks is None else scale.ticks(room, FONT, across)


def _names_width(scale: Scale) -> float:
    """Return the width of the names and the label to the left of a panel."""
    names = map(
        short_name, (scale.axis.ticks or {}).values() if scale.axis.ticks is not None else scale.categories or ()
    )
    return max([NUMBERS, *(GLYPH * FONT * len(name) + 10 for name in names)]) + (LINE + 4 if scale.axis.label else 0.0)


def _depth(scale: Scale, names: Ticks | None, width: float) -> float:
    """Return the height of the names and the label below a panel."""
    turned = names is not None and names[2]
    ticks = max(GLYPH * FONT * len(name) + 10 for name in names[1]) if names is not None and turned else TICKS
    return ticks + LINE * len(fold(scale.axis.label, width, FONT)) + 6


def _panel_height(scale: Scale) -> float:
    """Return the height of a panel: room for each name on y, otherwise the default."""
    if scale.categories is None:
        return PANEL
    rows = ROW * len(scale.categories)
    return max(rows if scale.is_wordy else min(rows, 1.3 * PANEL), 0.5 * PANEL)


def _count_color_bars(settled: Plan, row: list[int], view: int) -> int:
    """Count the color bars to the right of a view: those that no later view of its row uses."""
    return sum(max((v for v in row if v in ramp.views), default=-1) == view for ramp in settled.ramps)


def _legend_height(settled: Plan, plot: float) -> float:
    """Return the height of the legend; plotly uses columns of the widest entry if one line is too short."""
    widths = [GLYPH * FONT * len(entry.label) + 48 for entry in settled.entries]
    if not widths:
        return 0.0
    room = plot - GLYPH * FONT * len(settled.legend_title)
    lines = 1 if sum(widths) <= room else math.ceil(len(widths) / max(1, room // max(widths)))
    return LINE * lines + 14
