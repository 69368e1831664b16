"""Shapes drawn on matplotlib axes, one function per shape, and the axes themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize, to_hex
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from lorascope.charts.figure_plan import Plan, Ramp
from lorascope.charts.geometry import Area, Bars, Cells, Curve, Dots, Panel, Ruler, Shade, Words
from lorascope.charts.scales import Scale
from lorascope.charts.theme import FAINT, GLYPH, is_dark
from lorascope.files.printable import printable_lines

DASHES: list[Any] = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (8, 2)), (0, (8, 2, 1, 2, 1, 2))]
SHAPES = ["o", "s", "^", "D", "v", "P", "X"]
DOT = 4.0  # diameter of a dot in points
LARGEST = 11.0  # diameter in points of the largest dot, if the area shows a column
FEW = 200  # a logarithmic axis whose ends have a smaller ratio needs ticks between powers of ten
BETWEEN = ((1, 2, 5), (1, 3), (1,))  # multiples of powers of ten for these ticks, from most to fewest
SMALLEST_TEXT = 4.0  # points; numbers that only fit at a smaller size are omitted
SMALLEST_WORDS = 5.0  # points; words that only fit at a smaller size are replaced by the numbers


def draw(ax: Axes, plan: Plan, number: int, frame: Any = None) -> None:
    """Draw one frame of one view with its axes; call :func:`names` and :func:`numbers` once the size is known."""
    view = plan.views[number]
    for layer, shape in enumerate(view.panel.shapes(frame)):
        # Above the grid, and in the order of the marks.
        _DRAWERS[type(shape)](ax, shape, plan, number, 2 + layer / 1000)
    for axis, scale, ends, letter in ((ax.xaxis, view.panel.x, view.x, "x"), (ax.yaxis, view.panel.y, view.y, "y")):
        getattr(ax, f"set_{letter}label")(escape_dollar(scale.axis.label))
        if scale.log:
            getattr(ax, f"set_{letter}scale")("log")
            if _is_short(scale, ends):
                axis.set_major_locator(LogLocator(subs=BETWEEN[0]))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        elif scale.categories is None and scale.whole:
            axis.set_major_locator(MaxNLocator("auto", integer=True))
        if scale.categories is None:
            axis.grid(True, color=plan.theme.grid, linewidth=0.5)
        getattr(ax, f"set_{letter}lim")(ends)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def names(ax: Axes, panel: Panel) -> float:
    """Label the categories, as many as fit at the current size of the axes.

    Returns
    -------
    Points below the axes that vertical names need.
    """
    width, height = _size_in_points(ax)
    _draw_names(ax.yaxis, panel.y, height)
    return _draw_names(ax.xaxis, panel.x, width)


def numbers(ax: Axes, plan: Plan, number: int, frame: Any = None) -> None:
    """Write the numbers of a heat map into its cells, as large as the current size of the axes allows."""
    for shape in plan.views[number].panel.shapes(frame):
        if isinstance(shape, Cells) and shape.mark.text is not None and shape.values.size:
            _draw_numbers(ax, shape, plan.ramps[plan.heats[number]], *_size_in_points(ax))


def _size_in_points(ax: Axes) -> tuple[float, float]:
    """Return the width and height of axes in points."""
    box, points = ax.get_window_extent(), 72.0 / ax.figure.dpi
    return box.width * points, box.height * points


def _text_size(ax: Axes) -> float:
    """Return the font size of text inside axes, slightly smaller than that of the axis labels."""
    return 0.9 * float(ax.xaxis.label.get_fontsize())


def break_lines(text: str, room: float, size: float) -> list[str]:
    """Break text into lines of at most ``room`` points at a font size; a longer word gets its own line."""
    font = FontProperties(size=size)
    lines = []
    for part in printable_lines(text).splitlines():
        line = ""
        for word in part.split():
            longer = f"{line} {word}".lstrip()
            wide = text_to_path.get_text_width_height_descent(longer, font, ismath=False)[0] > room
            if wide and line:
                lines.append(line)
            line = word if wide else longer
        lines.append(line)
    return lines


def escape_dollar(text: str) -> str:
    """Escape text: a dollar sign does not start math, and a control character does not break an SVG."""
    return printable_lines(text).replace("$", r"\$")


def colormap(ramp: Ramp) -> Colormap:
    """Return the colors of a color bar, transparent for missing values."""
    return LinearSegmentedColormap.from_list(ramp.label or "ramp", ramp.colors).with_extremes(bad=(0, 0, 0, 0))


def norm(ramp: Ramp) -> Normalize:
    """Return the mapping from values to the colors of a color bar."""
    return (LogNorm if ramp.log else Normalize)(*ramp.limits)


def _is_short(scale: Scale, ends: tuple[float, float]) -> bool:
    return scale.log and bool(ends[1] < FEW * ends[0])


def _thin_ticks(axis: Any, room: float) -> None:
    """Set the ticks of a short logarithmic axis, as many as have room for their labels."""
    size = axis.get_major_ticks(1)[0].label1.get_fontsize()
    low, high = np.log(axis.get_view_interval())
    for subs in BETWEEN:
        locator = LogLocator(subs=subs)
        ticks = [tick for tick in locator.tick_values(np.exp(low), np.exp(high)) if low <= np.log(tick) <= high]
        # Fewer ticks would be no scale: the previous, denser ones stay.
        if len(ticks) < 2:
            return
        axis.set_major_locator(locator)
        across = [GLYPH * len(f"{tick:g} ") if axis.axis_name == "x" else 1.2 for tick in ticks]
        needed = size * (np.array(across[1:]) + across[:-1]) / 2
        if (np.diff(np.log(ticks)) / (high - low) * room >= needed).all():
            return


def _draw_names(axis: Any, scale: Scale, room: float) -> float:
    """Draw the names of categories that fit; return the depth in points of vertical names."""
    if scale.categories is None and scale.axis.ticks is None:
        if _is_short(scale, tuple(axis.get_view_interval())):
            _thin_ticks(axis, room)
        return 0.0
    size = axis.get_major_ticks(1)[0].label1.get_fontsize()
    positions, names, turned = scale.ticks(room, size, across=axis.axis_name == "y")
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(positions, [escape_dollar(name) for name in names], rotation=90 if turned else 0)
    return max(len(name) for name in names) * GLYPH * size if turned else 0.0


def _draw_numbers(ax: Axes, shape: Cells, ramp: Ramp, width: float, height: float) -> None:
    """Draw the texts of cells as large as they fit: words if these are legible, else numbers, else none."""
    rows, columns = shape.values.shape

    def fit(texts: dict[tuple[int, ...], str]) -> float:
        longest = max(map(len, texts.values()), default=1)
        return min(_text_size(ax), 0.9 * width / columns / (longest * GLYPH), 0.7 * height / rows)

    numbers = {
        place: format(value, str(shape.mark.text))
        for place, value in np.ndenumerate(shape.values)
        if np.isfinite(value)
    }
    told = {place: shape.words.get(place, number) for place, number in numbers.items()}
    texts = told if fit(told) >= SMALLEST_WORDS else numbers
    if (size := fit(texts)) < SMALLEST_TEXT:
        return
    scale, colors = norm(ramp), colormap(ramp)
    for (row, column), text in texts.items():
        ink = "#ffffff" if is_dark(to_hex(colors(scale(shape.values[row, column])))) else "#000000"
        ax.text(column, row, escape_dollar(text), color=ink, size=size, ha="center", va="center", zorder=3)


def _draw_curve(ax: Axes, shape: Curve, plan: Plan, number: int, zorder: float) -> None:
    ax.plot(shape.x, shape.y, color=shape.color, linestyle=DASHES[shape.dash % len(DASHES)], zorder=zorder)


def _draw_area(ax: Axes, shape: Area, plan: Plan, number: int, zorder: float) -> None:
    ax.fill_between(shape.x, shape.low, shape.high, color=shape.color, alpha=FAINT, linewidth=0, zorder=zorder)


def _draw_dots(ax: Axes, shape: Dots, plan: Plan, number: int, zorder: float) -> None:
    areas = DOT**2 if shape.share is None else LARGEST**2 * shape.share
    _draw_error_bars(ax, shape, plan, zorder)
    ax.scatter(
        shape.x,
        shape.y,
        s=areas,
        c=shape.colors,
        marker=SHAPES[shape.shape % len(SHAPES)],
        edgecolors=plan.theme.background,
        linewidths=0.3,
        zorder=zorder,
    )


def _draw_bars(ax: Axes, shape: Bars, plan: Plan, number: int, zorder: float) -> None:
    place, base, length = shape.place, shape.base, shape.top - shape.base
    if shape.lying:
        ax.barh(place, length, shape.width, left=base, color=shape.color, zorder=zorder)
    else:
        ax.bar(place, length, shape.width, bottom=base, color=shape.color, zorder=zorder)
    _draw_error_bars(ax, shape, plan, zorder)


def _draw_error_bars(ax: Axes, shape: Dots | Bars, plan: Plan, zorder: float) -> None:
    """Draw error bars from low to high, which need not contain the value."""
    if shape.low is None or shape.high is None:
        return
    if isinstance(shape, Dots):
        place, colors = shape.y if shape.lying else shape.x, shape.colors
    else:
        place, colors = shape.place, [plan.theme.ink] * len(shape.place)
    (ax.hlines if shape.lying else ax.vlines)(place, shape.low, shape.high, colors=colors, linewidth=0.9, zorder=zorder)


def _draw_cells(ax: Axes, shape: Cells, plan: Plan, number: int, zorder: float) -> None:
    rows, columns = shape.values.shape
    if not shape.values.size:
        return
    ramp, theme = plan.ramps[plan.heats[number]], plan.theme
    if np.isnan(shape.values).any():
        ground = Rectangle(
            (-0.5, -0.5), columns, rows, facecolor=theme.missing, edgecolor=theme.hatch, hatch="////////"
        )
        ground.set(linewidth=0, zorder=zorder)
        ax.add_patch(ground)
    ax.imshow(shape.values, cmap=colormap(ramp), norm=norm(ramp), aspect="auto", interpolation="nearest", zorder=zorder)


def _draw_ruler(ax: Axes, shape: Ruler, plan: Plan, number: int, zorder: float) -> None:
    style: dict[str, Any] = {"color": plan.theme.ink, "linewidth": 0.8, "linestyle": (0, (4, 2)), "zorder": zorder}
    if shape.y is not None:
        ax.axhline(shape.y, **style)
        _draw_note(ax, (0.99, shape.y), shape.label, ax.get_yaxis_transform(), "right", "bottom")
    if shape.x is not None:
        ax.axvline(shape.x, **style)
        late = shape.x > np.mean(plan.views[number].x)
        _draw_note(ax, (shape.x, 0.98), shape.label, ax.get_xaxis_transform(), "right" if late else "left", "top", 90)


def _draw_shade(ax: Axes, shape: Shade, plan: Plan, number: int, zorder: float) -> None:
    ax.axvspan(shape.x0, shape.x1, color=plan.theme.ink, alpha=FAINT / 2, linewidth=0, zorder=zorder)
    _draw_note(ax, ((shape.x0 + shape.x1) / 2, 0.98), shape.label, ax.get_xaxis_transform(), "center", "top")


def _draw_note(
    ax: Axes, place: tuple[Any, Any], text: str, transform: Any, across: str, up: str, turn: int = 0
) -> None:
    """Draw the label of a rule or a span at a distance of one or two points."""
    shift = ({"left": 2, "right": -2}.get(across, 0), {"bottom": 1, "top": -1}[up])
    style: dict[str, Any] = {"ha": across, "va": up, "size": _text_size(ax), "rotation": turn, "zorder": 4}
    ax.annotate(escape_dollar(text), place, shift, xycoords=transform, textcoords="offset points", **style)


def _draw_words(ax: Axes, shape: Words, plan: Plan, number: int, zorder: float) -> None:
    size = _text_size(ax)
    for x, y, text in zip(shape.x, shape.y, shape.text, strict=True):
        if np.isfinite(x) and np.isfinite(y):
            ax.text(x, y, escape_dollar(text), size=size, ha="center", va="center", zorder=zorder)


_DRAWERS: dict[type, Callable[[Axes, Any, Plan, int, float], None]] = {
    Curve: _draw_curve,
    Area: _draw_area,
    Dots: _draw_dots,
    Bars: _draw_bars,
    Cells: _draw_cells,
    Ruler: _draw_ruler,
    Shade: _draw_shade,
    Words: _draw_words,
}
