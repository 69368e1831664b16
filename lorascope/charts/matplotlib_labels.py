"""Names of categories and labels of logarithmic axes in matplotlib, as many as have room, and lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from lorascope.array_types import Float
from lorascope.charts.geometry import Panel
from lorascope.charts.matplotlib_style import keep_math
from lorascope.charts.scales import Scale, is_digits
from lorascope.charts.text_wrapping import GLYPH, count_lines, cut_name, wrap_text
from lorascope.files.printable import printable_lines

FEW = 200  # a logarithmic axis whose ends have a smaller ratio needs ticks between powers of ten
# Multiples of powers of ten for these ticks, from most to fewest; all are for axes with fewer than two of the first.
BETWEEN, ALL = ((1, 2, 5), (1, 3), (1,)), tuple(range(1, 10))
_NAMES_SHARE = 0.4  # of the width of a figure: room for the names on a vertical axis
_TICK = 3.0  # points between ticks without names
_BLANK = 0.5  # between the labels of two ticks, in font sizes
_LINE = 1.2  # height of a line of text, in font sizes


def label_categories(ax: Axes, panel: Panel) -> float:
    """Label the categories, as many as fit now; return the points below the axes that vertical names need."""
    depth = 0.0
    axes: tuple[Any, Any] = (ax.xaxis, ax.yaxis)
    for axis, scale, room in zip(axes, (panel.x, panel.y), size_in_points(ax), strict=True):
        size = float(axis.get_major_ticks(1)[0].label1.get_fontsize())
        ticks = scale.ticks(room, size, across=axis.axis_name == "y")
        if ticks is not None:
            # Every category has a tick, also one whose name has no room, unless there are very many.
            unnamed = sorted({*range(len(scale.names))}.difference(ticks.positions))
            has_room = scale.axis.ticks is None and room >= _TICK * len(scale.names)
            axis.set_minor_locator(FixedLocator(unnamed) if has_room else NullLocator())
            labels = ticks.names
            if axis.axis_name == "y":
                width = 72 * ax.figure.bbox.width / ax.figure.dpi
                labels = [_fit_beside(name, _NAMES_SHARE * width, room / len(labels), size) for name in labels]
            axis.set_ticks(ticks.positions, map(keep_math, labels), rotation=0)
            if ticks.turned:
                depth = max(map(len, ticks.names)) * GLYPH * size
                for tick, name in zip(axis.get_major_ticks(), ticks.names, strict=True):
                    if scale.is_wordy or not is_digits(name):
                        tick.label1.set_rotation(90)
        elif is_short(scale):
            _thin_ticks(axis, room, size)
        elif not scale.log and axis.axis_name == "x":
            _space_numbers(axis, room, size)
    return depth


def size_in_points(ax: Axes) -> tuple[float, float]:
    """Return the width and height of axes in points."""
    box, points = ax.get_window_extent(), 72.0 / ax.figure.dpi
    return box.width * points, box.height * points


def is_short(scale: Scale) -> bool:
    return scale.log and bool(scale.limits[1] < FEW * scale.limits[0])


def _fit_beside(name: str, width: float, height: float, size: float) -> str:
    """Fold a name to a width, or cut it in its middle if its lines are higher than its place; all in points."""
    folded = wrap_text(name, width, size)
    if count_lines(folded) * _LINE * size <= max(height, _LINE * size):
        return folded
    return cut_name(name, width, size)


def _space_numbers(axis: Any, room: float, size: float) -> None:
    """Label every second tick of a horizontal axis of numbers, or fewer, if not all labels fit in the room."""
    low, high = sorted(axis.get_view_interval())
    labels = axis.get_majorticklabels()
    widest = (max((len(label.get_text()) for label in labels), default=0) * GLYPH + _BLANK) * size
    positions = [label.get_position()[0] for label in labels]
    visible = [position for position in positions if low <= position <= high]
    if len(visible) > 1:
        stride = math.ceil(widest * (high - low) / (room * (visible[1] - visible[0])))
        if stride > 1:
            axis.set_major_locator(FixedLocator(visible[::stride]))


def _thin_ticks(axis: Any, room: float, size: float) -> None:
    """Set the ticks of a short logarithmic axis, as many as have room for their labels."""
    low, high = np.log(axis.get_view_interval())
    choices: Sequence[Sequence[int]] = BETWEEN
    if len(_log_ticks(low, high, BETWEEN[0])) < 2:
        choices = [ALL]
        ticks = _log_ticks(low, high, ALL)
        # Multiples of a power of ten may end far below the upper end, as from 0.7 to 1.5.
        if len(ticks) < 2 or high - np.log(ticks[-1]) > (high - low) / 3:
            axis.set_major_locator(MaxNLocator(min(5, max(1, int(room / (4 * size)))), steps=[1, 2, 5, 10]))
            return
    for subs in choices:
        locator, ticks = LogLocator(subs=subs), _log_ticks(low, high, subs)
        # Fewer ticks would be no scale: the previous, denser ones stay.
        if len(ticks) < 2:
            return
        axis.set_major_locator(locator)
        across = np.full(len(ticks), _LINE)
        if axis.axis_name == "x":
            across = np.array([GLYPH * len(f"{tick:g} ") for tick in ticks])
        required_gaps = size * (across[1:] + across[:-1]) / 2
        if (np.diff(np.log(ticks)) / (high - low) * room >= required_gaps).all():
            return


def _log_ticks(low: float, high: float, subs: Sequence[int]) -> Float[np.ndarray, "ticks"]:
    """Return multiples of powers of ten between two ends, which are natural logarithms."""
    decades = 10.0 ** np.arange(math.floor(low / math.log(10)), math.ceil(high / math.log(10)))
    ticks = np.outer(decades, subs).ravel()
    return ticks[(low <= np.log(ticks)) & (np.log(ticks) <= high)]


def break_lines(text: str, room: float, size: float) -> str:
    """Break text into lines of at most ``room`` points at a font size; a longer word gets its own line."""
    font = FontProperties(size=size)
    lines = []
    for paragraph in printable_lines(text).splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".lstrip()
            if line and text_to_path.get_text_width_height_descent(longer, font, ismath=False)[0] > room:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)
