"""Charts as matplotlib figures: small multiples for frames, one legend, and the caption below.

Figures are created without pyplot and in a temporary style: the settings and the current figure of the caller do not
change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from lorascope.charts.chart import Drawable
from lorascope.charts.figure_plan import Entry, Plan, plan
from lorascope.charts.matplotlib_artists import (
    DASHES,
    DOT,
    SHAPES,
    break_lines,
    colormap,
    draw,
    escape_dollar,
    names,
    norm,
    numbers,
)
from lorascope.charts.theme import GLYPH, Theme, fold, inches, theme

FRAMES = 8  # maximum number of small multiples
ACROSS = {"column": 2, "page": 4}  # small multiples per row
SHAPE = 0.68  # height of a panel as a fraction of its width
LABELS = 0.7  # inches for the title and labels of an axis


@dataclass(frozen=True)
class Place:
    """Position of one frame of one view in the grid of a figure."""

    view: int
    frame: Any
    row: int
    start: int
    stop: int


def figure(drawable: Drawable, name: str | None = None, width: str | None = None) -> Figure:
    """Draw a chart or panels on a new figure.

    Parameters
    ----------
    drawable : Chart or Panels
        Chart or panels to draw.
    name : str, optional
        Theme, default "light".
    width : {"column", "page"}, optional
        Default: column for a single chart, page for panels and frames.
    """
    settled = plan(drawable, theme(name or "light"))
    width = width or ("column" if len(settled.views) == 1 and not settled.frames else "page")
    with style(settled.theme):
        places = _lay_out_grid(settled, ACROSS[width] if settled.frames else 1)
        return _compose(settled, places, inches(width))


def write(drawable: Drawable, path: Path, kind: str, name: str, width: str | None, metadata: dict[str, Any]) -> None:
    """Draw to a file of format ``kind`` ("pdf", "svg" or "png"), with metadata of that format."""
    made = figure(drawable, name, width)
    with style(theme(name)):
        made.savefig(path, format=kind, metadata=metadata)


def draw_onto(ax: Axes, drawable: Drawable, name: str | None = None) -> Axes:
    """Draw on the caller's axes, in the caller's style."""
    settled = plan(drawable, theme(name or "light"))
    if len(settled.views) > 1 or settled.frames:
        raise ValueError("cannot draw panels or frames on ax: pass a single chart, such as chart.at(frame)")
    draw(ax, settled, 0)
    ax.set_title(escape_dollar(settled.title))
    if settled.entries:
        ax.legend(handles=[_handle(entry) for entry in settled.entries], title=escape_dollar(settled.legend_title))
    for ramp in settled.ramps:
        mappable = ScalarMappable(norm(ramp), colormap(ramp))
        ax.figure.colorbar(mappable, ax=ax, label=escape_dollar(ramp.label))
    names(ax, settled.views[0].panel)
    numbers(ax, settled, 0)
    return ax


def style(look: Theme) -> Any:
    """Return a context with matplotlib's own defaults and the sizes and colors of a theme."""
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    ground = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    sizes = (
        "font.size",
        "axes.labelsize",
        "axes.titlesize",
        "figure.titlesize",
        "legend.fontsize",
        "legend.title_fontsize",
    )
    settings: dict[str, Any] = {
        **dict.fromkeys(ink, look.ink),
        **dict.fromkeys(ground, look.background),
        **dict.fromkeys(sizes, look.size),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 0.93 * look.size),
        **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
        **dict.fromkeys(("xtick.minor.size", "ytick.minor.size"), 1.5),
        "axes.titlelocation": "left",
        "figure.titleweight": "bold",
        "axes.titlepad": 4.0,
        "axes.labelpad": 2.5,
        "lines.linewidth": 1.2,
        "hatch.linewidth": 0.5,
        "legend.frameon": False,
        # Embed TrueType fonts, since many journals reject type 3.
        "pdf.fonttype": 42,
        "savefig.dpi": 300,
        # With fixed ids, equal figures give equal bytes.
        "svg.hashsalt": "lorascope",
    }
    # Reset first, so that the caller's settings have no effect.
    return matplotlib.style.context(settings, after_reset=True)


def _lay_out_grid(settled: Plan, across: int) -> list[Place]:
    """Place the panels as arranged or, with frames, the frames of each panel in rows of ``across``."""
    if not settled.frames:
        # A common multiple lets rows with different numbers of panels share one grid.
        columns = math.lcm(*(len(row) for row in settled.rows))
        return [
            Place(view, None, number, column * columns // len(row), (column + 1) * columns // len(row))
            for number, row in enumerate(settled.rows)
            for column, view in enumerate(row)
        ]
    shown = _spread_frames(settled.frames, FRAMES if len(settled.views) == 1 else across)
    across = min(across, len(shown))
    places = []
    for number, view in enumerate(settled.views):
        if view.panel.chart.frame is None:
            places.append(Place(number, None, number, 0, across))
            continue
        for index, frame in enumerate(shown):
            places.append(Place(number, frame, number + index // across, index % across, index % across + 1))
    return places


def _spread_frames(frames: list[Any], most: int) -> list[Any]:
    """Return at most ``most`` evenly spaced frames, including the first and the last."""
    if len(frames) <= most:
        return frames
    return [frames[round(index * (len(frames) - 1) / (most - 1))] for index in range(most)]


def _compose(settled: Plan, places: list[Place], width: float) -> Figure:
    """Draw axes, legend, color bars and caption on a figure ``width`` inches wide and as high as necessary."""
    look = settled.theme
    columns = max(place.stop for place in places)
    cells = {place: width * (place.stop - place.start) / columns for place in places}
    heights = [
        max(_panel_inches(settled, place, cells[place], look.size) for place in places if place.row == row)
        for row in range(places[-1].row + 1)
    ]
    made = Figure(figsize=(width, sum(heights)))
    # The canvas is necessary to measure text.
    renderer = FigureCanvasAgg(made).get_renderer()
    grid = made.add_gridspec(len(heights), columns, height_ratios=heights)
    axes = {place: made.add_subplot(grid[place.row, place.start : place.stop]) for place in places}
    for place, ax in axes.items():
        draw(ax, settled, place.view, place.frame)
        _draw_axis_labels(ax, settled, place, places, (72 * cells[place], 72 * 0.8 * heights[place.row]))
    for ramp in settled.ramps:
        painted = [ax for place, ax in axes.items() if place.view in ramp.views]
        bar = made.colorbar(ScalarMappable(norm(ramp), colormap(ramp)), ax=painted, fraction=0.06, pad=0.02, aspect=22)
        bar.set_label(escape_dollar("\n".join(fold(ramp.label, 72 * 0.8 * sum(heights), look.size))))
        bar.outline.set_linewidth(0.4)
        if not ramp.log:
            bar.locator = MaxNLocator("auto", steps=[1, 2, 5, 10])  # no steps of 2.5: ranks and counts are integers
    title = "\n".join(fold(settled.title, 72 * width, 1.1 * look.size))
    if title:
        made.suptitle(escape_dollar(title), x=0.01, ha="left")
    foot = [_draw_caption(made, settled), _legend(made, settled, width)]
    head = (title.count("\n") + 1) * 1.6 * look.size / 72 if title else 0.0
    for _ in range(2):  # twice: y labels take width from x, titles and vertical names take height
        _stack_foot(made, sum(heights) + head, foot, renderer)
        for place, ax in axes.items():
            _draw_title(ax, settled, place)
        depths = [(place.row, names(ax, settled.views[place.view].panel)) for place, ax in axes.items()]
    turned = sum(max(depth for row, depth in depths if row == number) for number in range(len(heights))) / 72
    _stack_foot(made, sum(heights) + head + turned, foot, renderer)
    for place, ax in axes.items():
        names(ax, settled.views[place.view].panel)  # all may fit now that vertical names have room
        numbers(ax, settled, place.view, place.frame)
    return made


def _panel_inches(settled: Plan, place: Place, width: float, size: float) -> float:
    """Return the height of a panel in inches: room for every name on y, else in proportion to the width."""
    scale = settled.views[place.view].panel.y
    shape = max(1.4, SHAPE * min(width, 4.5))
    if scale.categories is None:
        return shape
    lines = LABELS + len(scale.categories) * 1.45 * size / 72
    return max(lines if scale.is_wordy else min(lines, 0.95 * width), 0.75 * shape)


def _draw_axis_labels(ax: Axes, settled: Plan, place: Place, places: list[Place], room: tuple[float, float]) -> None:
    """Label axes, wrapped to ``room`` (width, height in points), unless a neighbor shows the same axis."""
    view, size = settled.views[place.view], settled.theme.size
    below = [other for other in places if other.view == place.view and other.row > place.row]
    left = [settled.views[other.view] for other in places if other.row == place.row and other.stop == place.start]
    x, y = view.panel.chart.x.label, view.panel.chart.y.label
    ax.set_xlabel(escape_dollar("\n".join(fold(x, 0.8 * room[0], size))))
    ax.set_ylabel(escape_dollar("\n".join(fold(y, room[1], size))))
    if any(other.start == place.start for other in below):
        ax.set_xlabel("")
        ax.tick_params(labelbottom=False)
    if any(other.y == view.y and other.panel.y == view.panel.y for other in left):
        ax.set_ylabel("")
        ax.tick_params(labelleft=False)


def _draw_title(ax: Axes, settled: Plan, place: Place) -> None:
    """Draw the title of one of several panels, with its frame, wrapped to the current width of the axes."""
    titles = [settled.views[place.view].panel.chart.title] if len(settled.views) > 1 else []
    if place.frame is not None:
        titles.append(f"{settled.frame_label} {place.frame}")
    room = 72 * ax.get_window_extent().width / ax.figure.dpi
    ax.set_title(escape_dollar("\n".join(fold(", ".join(filter(None, titles)), 1.1 * room, settled.theme.size))))


def _draw_caption(made: Figure, settled: Plan) -> Text:
    """Draw the caption, wrapped here because matplotlib wraps differently at every resolution."""
    lines = "\n".join(break_lines(settled.caption, 0.98 * 72 * made.get_figwidth(), settled.theme.size))
    return made.text(0.01, 0.0, escape_dollar(lines), ha="left", va="bottom", in_layout=False)


def _legend(made: Figure, settled: Plan, width: float) -> Legend | None:
    """Draw the legend with as many entries per row as fit."""
    if not settled.entries:
        return None
    size = settled.theme.size
    entries = [
        replace(entry, label="\n".join(fold(entry.label, 72 * width - 4 * size, size))) for entry in settled.entries
    ]
    widths = [(max(map(len, entry.label.split("\n"))) * GLYPH + 4.0) * size for entry in entries]
    depth = next(depth for depth in range(1, len(entries) + 1) if _has_room(widths, depth, 72 * width))
    legend = made.legend(
        handles=[_handle(entry) for entry in entries],
        title=escape_dollar(settled.legend_title) or None,
        ncols=math.ceil(len(entries) / depth),
        loc="lower center",
        borderpad=0.2,
        columnspacing=1.2,
        handlelength=1.8,
    )
    legend.set_in_layout(False)
    return legend


def _has_room(widths: list[float], depth: int, room: float) -> bool:
    """Return whether entries in columns of ``depth`` fit side by side; a single column always does."""
    columns = [widths[start : start + depth] for start in range(0, len(widths), depth)]
    return len(columns) == 1 or sum(map(max, columns)) <= room


def _stack_foot(made: Figure, height: float, foot: list[Any], renderer: Any) -> None:
    """Stack caption and legend at the bottom, and lay out the panels in the ``height`` inches above them."""
    parts = [(part, part.get_window_extent(renderer).height / made.dpi) for part in foot if part is not None]
    gap, used = 0.08, 0.04
    total = height + sum(depth + gap for _, depth in parts) + gap
    made.set_figheight(total)
    for part, depth in parts:
        if isinstance(part, Text):
            part.set_y(used / total)
        else:
            part.set_bbox_to_anchor((0.5, used / total), made.transFigure)
        used += depth + gap
    engine = ConstrainedLayoutEngine(rect=(0, used / total, 1, 1 - used / total))
    made.set_layout_engine(engine)
    engine.execute(made)
    engine.execute(made)  # again: the first may have changed the tick labels of a color bar


def _handle(entry: Entry) -> Line2D | Patch:
    """Return the legend symbol of an entry."""
    if entry.kind == "patch":
        return Patch(color=entry.color, label=escape_dollar(entry.label), linewidth=0)
    if entry.kind == "line":
        return Line2D(
            [], [], color=entry.color, linestyle=DASHES[entry.style % len(DASHES)], label=escape_dollar(entry.label)
        )
    marker = SHAPES[entry.style % len(SHAPES)]
    return Line2D(
        [], [], color=entry.color, marker=marker, markersize=DOT, linestyle="", label=escape_dollar(entry.label)
    )
