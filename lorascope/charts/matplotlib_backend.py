"""Charts as matplotlib figures: small multiples for frames, one legend, and the caption below.

Figures are created without pyplot and in a temporary style: the settings and the current figure of the caller do not
change. What the caller has changed in ``matplotlib.rcParams`` replaces the settings of the style.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lorascope.charts.chart import Drawable
from lorascope.charts.figure_plan import Entry, FigurePlan, panel_entries, plan_figure
from lorascope.charts.figure_style import Palette, figure_theme
from lorascope.charts.geometry import Area, Bars, Cells, Curve, Dots, Panel
from lorascope.charts.matplotlib_labels import BETWEEN, break_lines, is_short, label_categories, size_in_points
from lorascope.charts.matplotlib_shapes import (
    DASHES,
    MARKERS,
    MOST_CELLS,
    SEAM,
    color_scale,
    draw_shape,
    fill_settings,
    text_size,
    write_text,
)
from lorascope.charts.matplotlib_style import caller_theme, escape_dollar, keep_math, style
from lorascope.charts.text_wrapping import GLYPH, count_lines, wrap_text
from lorascope.charts.theme import FAINT, Theme, readable_ink, width_in_inches

_SYMBOL_SHAPES = {"line": Curve, "dot": Dots, "patch": Bars, "band": Area}
SMALLEST_TEXT = 4.0  # points; numbers that only fit at a smaller size are omitted
SMALLEST_WORDS = 5.0  # points; words that only fit at a smaller size are replaced by the numbers
FRAMES = 8  # maximum number of small multiples
MULTIPLE, MIN_PANEL = 1.5, 1.3  # minimum width in inches of a small multiple, and of a panel next to others
SHAPE = 0.68  # height of a panel as a fraction of its width
SQUARE = 2.8  # largest side of a square panel in inches, with its labels
LOW_ROW = 1.4  # smallest usual height in inches of a panel, with its labels
LEAST_ROW = 1.0  # inches that a row of panels needs with its labels
LABELS = 0.7  # inches for the title and labels of an axis
_GAP = 0.08  # inches between the caption, the legend and the panels


@dataclass(frozen=True)
class _GridPlace:
    """Row and columns (from ``start`` to before ``stop``) of one frame of a panel in the grid of a figure."""

    panel: int
    frame: Any
    row: int
    start: int
    stop: int


def to_matplotlib(
    drawable: Drawable,
    name: str | None = None,
    width: str | float | None = None,
    *,
    palette: Palette | None = None,
    **layout: Any,
) -> Figure:
    """Draw on a new matplotlib figure; see :meth:`Drawable.mpl`."""
    return _draw_figure(drawable, figure_theme(name, "light", palette), width, **layout)


def _draw_figure(
    drawable: Drawable,
    look: Theme,
    width: str | float | None = None,
    *,
    height: float | None = None,
    steps: Sequence[Any] | None = None,
    **texts: Any,
) -> Figure:
    settled = plan_figure(drawable.pick_frames(steps), caller_theme(look), **texts)
    if width is None:
        width = "column" if len(settled.panels) == 1 and not settled.frames else "page"
    inches = width_in_inches(width)
    with style(settled.theme):
        return _compose(settled, _lay_out_grid(settled, inches, steps is not None), inches, height)


def write(
    drawable: Drawable, kind: str, look: Theme, metadata: dict[str, Any], dpi: float | None = None, **layout: Any
) -> bytes:
    """Return the content of a file ("pdf", "svg", "pgf" or "png") of matplotlib, with metadata of that format.

    ``layout`` has further arguments of :func:`to_matplotlib`.
    """
    drawn_figure, file = _draw_figure(drawable, look, **layout), io.BytesIO()
    with style(caller_theme(look)):
        # Pixels are counted by rounding down, and a product such as 3.03 * 300 is slightly too small.
        width, height = drawn_figure.get_size_inches()
        drawn_figure.set_size_inches(width + 1e-9, height + 1e-9)
        settings: dict[str, Any] = {"metadata": metadata}
        if kind == "pgf":  # it has no metadata
            if any(ax.images for ax in drawn_figure.axes):
                raise ValueError(f"cannot save a heat map of more than {MOST_CELLS} cells as pgf: save it as pdf")
            _require_latex()
            settings = {}
        drawn_figure.savefig(file, format=kind, dpi=dpi, **settings)
    return file.getvalue()


def _require_latex() -> None:
    """Raise FileNotFoundError if the program that measures text for pgf is not installed."""
    program = matplotlib.rcParams["pgf.texsystem"]
    if shutil.which(program) is None:
        raise FileNotFoundError(f"cannot save as pgf: {program} is not installed")


def draw_onto(
    drawable: Drawable,
    axes: Collection[Any],
    name: str | None,
    title: str | None,
    legend: bool,
    palette: Palette | None,
    steps: Sequence[Any] | None,
) -> None:
    """Draw on the caller's matplotlib axes, in the caller's style; the legend is on the first of them."""
    look = caller_theme(figure_theme(name, "light", palette))
    settled = plan_figure(drawable.pick_frames(steps), look, title, legend=legend)
    subplots: list[tuple[Panel, Any]] = []
    for panel in settled.panels:
        frames: Sequence[Any] = [None]
        if panel.chart.frame is not None:
            frames = settled.frames
        subplots += product([panel], frames)
    all_axes: list[Any] = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(all_axes) != len(subplots):
        remedy = "pass axes=[...] with one for each"
        if settled.frames:
            remedy = "choose as many steps=[...]"
        raise ValueError(f"cannot draw {len(subplots)} panels on {len(all_axes)} axes: {remedy}")
    for ax, (panel, frame) in zip(all_axes, subplots, strict=True):
        draw(ax, panel, frame)
        titles = [_panel_title(settled, panel, frame)]
        if len(subplots) == 1:
            titles.insert(0, settled.title)
        ax.set_title(keep_math(", ".join(filter(None, titles))))
    if settled.entries:
        all_axes[0].legend(handles=list(map(_handle, settled.entries)), title=keep_math(settled.legend_title))
    for ramp in settled.ramps:
        painted = [ax for ax, (panel, _) in zip(all_axes, subplots, strict=True) if panel.number in ramp.views]
        painted[0].figure.colorbar(color_scale(ramp), ax=painted, label=keep_math(ramp.label))
    for ax, (panel, frame) in zip(all_axes, subplots, strict=True):
        label_categories(ax, panel)
        _write_cell_texts(ax, panel, frame)


def _panel_title(settled: FigurePlan, panel: Panel, frame: Any) -> str:
    """Return the title above the axes of one frame of a panel."""
    titles = []
    if len(settled.panels) > 1 and panel.chart.title:
        titles.append(panel.chart.title)
    if frame is not None:
        titles.append(f"{settled.frame_label} {frame}")
    return ", ".join(titles)


def _lay_out_grid(settled: FigurePlan, width: float, draw_all: bool) -> list[_GridPlace]:
    """Place the panels as arranged or, with frames, the frames of each panel, in as many rows as ``width`` requires.

    Of the frames, ``draw_all`` or some, evenly spaced.
    """
    min_width = MULTIPLE if settled.frames else MIN_PANEL
    across = max(1, int(width / max([min_width, *map(_names_width, settled.panels)])))
    # Frames of a panel have equal widths.
    spans = [1 if settled.frames else panel.chart.span for panel in settled.panels]
    rows: list[tuple[int, Iterable[tuple[int, Any]]]] = []  # number of equal places, panels and frames in them
    if settled.frames:
        frames, max_frames = settled.frames, across
        if len(settled.panels) == 1:
            max_frames = FRAMES
        if len(frames) > max_frames and not draw_all:
            # Evenly spaced frames, including the first and the last.
            frames = [frames[round(index * (len(frames) - 1) / (max_frames - 1))] for index in range(max_frames)]
        for panel in settled.panels:
            if panel.chart.frame is None:
                rows.append((1, [(panel.number, None)]))
                continue
            columns = _spread_evenly(len(frames), across)
            for start in range(0, len(frames), columns):
                rows.append((columns, product([panel.number], frames[start : start + columns])))
    else:
        for row in settled.rows:
            columns = _spread_evenly(max(len(row), settled.columns), across)
            if len(row) < sum(spans[number] for number in row) > across:
                columns = 1
            for start in range(0, len(row), columns):
                line = row[start : start + columns]
                span = sum(spans[number] for number in line)
                rows.append((max(columns, span), product(line, [None])))
    # A common multiple lets rows with different numbers of panels share one grid.
    columns = math.lcm(*(count for count, _ in rows))
    cells = []
    for number, (count, members) in enumerate(rows):
        start = 0
        for panel_number, frame in members:
            stop = start + spans[panel_number] * columns // count
            cells.append(_GridPlace(panel_number, frame, number, start, stop))
            start = stop
    return cells


def _spread_evenly(count: int, across: int) -> int:
    """Return how many of ``count`` panels are in a row of at most ``across``, so that all rows are about as long."""
    return math.ceil(count / math.ceil(count / across))


def _names_width(panel: Panel) -> float:
    """Return the inches that a panel needs for the names of its x axis, written vertically."""
    if not panel.x.is_wordy:
        return 0.0
    return LABELS + 1.25 * len(panel.x.names) * panel.theme.size / 72


def _compose(settled: FigurePlan, cells: list[_GridPlace], width: float, fixed_height: float | None) -> Figure:
    """Draw axes, legend, color bars and caption on a figure of ``width`` inches, by default as high as necessary."""
    size = settled.theme.size
    columns = max(cell.stop for cell in cells)
    widths = {cell: width * (cell.stop - cell.start) / columns for cell in cells}
    heights = [0.0] * (cells[-1].row + 1)
    for cell in cells:
        usual, scale = max(LOW_ROW, SHAPE * min(widths[cell], 4.5)), settled.panels[cell.panel].y
        if settled.panels[cell.panel].chart.square:
            usual = min(widths[cell], SQUARE)
        elif settled.frames and cell.frame is None:
            usual = max(LOW_ROW, usual / 2)  # what all frames share is less than the frames
        lines = LABELS + len(scale.names) * 1.45 * size / 72
        if scale.axis.compact and any(other.panel == cell.panel and other.row > cell.row for other in cells):
            lines -= LABELS / 2  # a frame below has the labels of x
        heights[cell.row] = max(heights[cell.row], scale.height(usual, lines, 0.95 * widths[cell], 0.75 * usual))
    if fixed_height is not None:
        heights = [row_height * fixed_height / sum(heights) for row_height in heights]
    drawn_figure = Figure(figsize=(width, sum(heights)))
    # The canvas is necessary to measure text.
    renderer = FigureCanvasAgg(drawn_figure).get_renderer()
    grid = drawn_figure.add_gridspec(len(heights), columns, height_ratios=heights)
    panels = []
    for cell in cells:
        ax, panel = drawn_figure.add_subplot(grid[cell.row, cell.start : cell.stop]), settled.panels[cell.panel]
        panels.append((cell, ax, panel))
        draw(ax, panel, cell.frame)
        ax.set_xlabel(keep_math(wrap_text(panel.x.axis.label, 0.8 * 72 * widths[cell], size)))
        ax.set_ylabel(keep_math(wrap_text(panel.y.axis.label, 72 * 0.8 * heights[cell.row], size)))
        # A neighbor that shows the same axis has its labels.
        for other in cells:
            if other.panel == cell.panel and other.row > cell.row and other.start == cell.start:
                ax.set_xlabel("")
                ax.tick_params(labelbottom=False)
            is_left = other.row == cell.row and other.stop == cell.start
            if is_left and settled.panels[other.panel].y == panel.y:
                ax.set_ylabel("")
                ax.tick_params(labelleft=False)
    for ramp in settled.ramps:
        painted = [ax for cell, ax, _ in panels if cell.panel in ramp.views]
        bar = drawn_figure.colorbar(color_scale(ramp), ax=painted, fraction=0.06, pad=0.02, aspect=22)
        bar.set_label(keep_math(wrap_text(ramp.label, 72 * 0.8 * sum(heights), size)), labelpad=4)
        bar.outline.set_linewidth(0.4)
        solids: Any = bar.solids
        solids.set(rasterized=False, edgecolor="face", linewidth=3 * SEAM)  # vectors, as the cells, and narrower
        bar.locator = MaxNLocator("auto", steps=[1, 2, 5, 10])  # no steps of 2.5: ranks and counts are integers
    title = wrap_text(settled.title, 72 * width, 1.1 * size)
    if title:
        drawn_figure.suptitle(keep_math(title), x=0.01, ha="left")
    # Wrapped here, because matplotlib wraps differently at every resolution.
    foot: list[Any] = []
    if caption := escape_dollar(break_lines(settled.caption, 0.96 * 72 * width, size)):
        foot.append(drawn_figure.text(0.01, 0.0, caption, ha="left", va="bottom", in_layout=False))
    if settled.entries:
        foot.append(_draw_legend(drawn_figure, settled, width))
    head = count_lines(title) * 1.6 * size / 72
    depths = [artist.get_window_extent(renderer).height / drawn_figure.dpi + _GAP for artist in foot]
    below, turned = sum(depths) + _GAP, 0.0
    smallest = math.ceil(10 * (LEAST_ROW * len(heights) + head + below)) / 10
    if fixed_height is not None and fixed_height < smallest:
        raise ValueError(f"height must be >= {smallest} inches for this figure, got {fixed_height}")
    for _ in range(2):  # twice: y labels take width from x, titles and vertical names take height
        _stack_foot(drawn_figure, fixed_height or sum(heights) + head + turned + below, foot, depths)
        for cell, ax, panel in panels:
            ax.apply_aspect()  # a square panel is narrower than its cell
            # A title may be wider than its panel, but must not leave the figure.
            to_edge = 72 * width * (1 - ax.get_position().x0)
            room = min(1.1 * size_in_points(ax)[0], to_edge)
            ax.set_title(keep_math(wrap_text(_panel_title(settled, panel, cell.frame), room, size)))
        names = [0.0] * len(heights)
        for cell, ax, panel in panels:
            room = label_categories(ax, panel)
            if not ax.xaxis.get_tick_params()["labelbottom"]:
                room = 0.0  # a frame below has the names
            if panel.y.axis.compact:  # further lines of its title and label need height
                room += 1.2 * size * f"{ax.get_title()}{ax.get_xlabel()}".count("\n")
            names[cell.row] = max(names[cell.row], room)
        turned = sum(names) / 72
    _stack_foot(drawn_figure, fixed_height or sum(heights) + head + turned + below, foot, depths)
    for _, ax, panel in panels:
        label_categories(ax, panel)  # all may fit now that vertical names have room
    engine: Any = drawn_figure.get_layout_engine()
    engine.execute(drawn_figure)  # these may take width from the cells
    for cell, ax, panel in panels:
        _write_cell_texts(ax, panel, cell.frame)
    return drawn_figure


def _draw_legend(drawn_figure: Figure, settled: FigurePlan, width: float) -> Legend:
    """Draw the legend with as many entries per row as fit, at least one."""
    size = settled.theme.size
    entries = [replace(entry, label=wrap_text(entry.label, 72 * width - 4 * size, size)) for entry in settled.entries]
    widths = [(max(map(len, entry.label.split("\n"))) * GLYPH + 4.6) * size for entry in entries]
    for depth in range(1, len(entries) + 1):
        columns = [widths[start : start + depth] for start in range(0, len(widths), depth)]
        if sum(map(max, columns)) <= 72 * width:
            break
    gaps: dict[str, Any] = {"borderpad": 0.2, "columnspacing": 1.2, "handlelength": 2.4}
    title = keep_math(settled.legend_title) or None
    handles = list(map(_handle, entries))
    legend = drawn_figure.legend(handles=handles, title=title, loc="lower center", ncols=len(columns), **gaps)
    legend.set_in_layout(False)
    return legend


def _stack_foot(drawn_figure: Figure, total: float, foot: list[Any], depths: list[float]) -> None:
    """Stack caption and legend at the bottom of ``total`` inches, and lay out the panels above them."""
    used = _GAP / 2
    drawn_figure.set_figheight(total)
    for artist, depth in zip(foot, depths, strict=True):
        if isinstance(artist, Text):
            artist.set_y(used / total)
        else:
            artist.set_bbox_to_anchor((0.5, used / total), drawn_figure.transFigure)
        used += depth
    engine = ConstrainedLayoutEngine(rect=(0, used / total, 1, 1 - used / total))
    drawn_figure.set_layout_engine(engine)
    engine.execute(drawn_figure)
    engine.execute(drawn_figure)  # again: the first may have changed the tick labels of a color bar


def _handle(entry: Entry) -> Line2D | Patch:
    """Return the legend symbol of an entry."""
    label = keep_math(entry.label)
    if entry.kind == "patch":
        return Patch(label=label, **fill_settings(entry.color, entry.style))
    if entry.kind == "band":
        return Patch(label=label, color=entry.color, alpha=FAINT, linewidth=0)
    if entry.kind == "line":
        marker: dict[str, Any] = {"marker": MARKERS.get(entry.marker)}
        return Line2D([], [], color=entry.color, label=label, linestyle=DASHES[entry.style], **marker)
    look: dict[str, Any] = {"marker": MARKERS.get(entry.style), "linestyle": ""}
    if entry.style.endswith("-open") and entry.style != "line-ns-open":
        look["fillstyle"] = "none"
    return Line2D([], [], color=entry.color, label=label, **look)


def draw(ax: Axes, panel: Panel, frame: Any = None) -> None:
    """Draw one frame of a panel with matplotlib; names and cell texts are written once the size is known."""
    artists = []
    for layer, shape in enumerate(panel.shapes(frame)):
        # Above the grid, and in the order of the marks.
        artists.append((shape, draw_shape(ax, shape, panel, 2 + layer / 1000)))
    for entry in panel_entries(panel):
        matching = [(shape, artist) for shape, artist in artists if getattr(shape, "group", None) == entry.group]
        if matching:
            # The artist that looks like the symbol of the legend, if several show the category.
            _, artist = max(matching, key=lambda pair: isinstance(pair[0], _SYMBOL_SHAPES[entry.kind]))
            artist.set_label(keep_math(entry.label))
        elif entry.kind in ("line", "dot"):
            ax.add_artist(_handle(entry))  # a style that several categories share has no separate artist
    if panel.chart.square:
        ax.set_box_aspect(1)
    for axis, scale in ((ax.xaxis, panel.x), (ax.yaxis, panel.y)):
        axis.set_label_text(keep_math(scale.axis.label))
        if scale.log:
            ax.set(**{f"{axis.axis_name}scale": "log"})
            if is_short(scale):
                axis.set_major_locator(LogLocator(subs=BETWEEN[0]))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        elif scale.categories is None and scale.is_integer:
            axis.set_major_locator(MaxNLocator("auto", integer=True))
        if scale.categories is None:
            axis.grid(True)
        ax.set(**{f"{axis.axis_name}lim": scale.limits})
    ax.set_axisbelow(True)


def _write_cell_texts(ax: Axes, panel: Panel, frame: Any = None) -> None:
    """Write the words of a heat map into its cells or, if these are not legible, the numbers, if they fit."""
    for cells in panel.shapes(frame):
        if not isinstance(cells, Cells) or cells.mark.text is None or not cells.texts:
            continue
        (rows, columns), (width, height) = cells.values.shape, size_in_points(ax)
        colors = color_scale(cells.ramp)
        words = {cell: cells.words.get(cell, number) for cell, number in cells.texts.items()}
        for texts, smallest in ((words, SMALLEST_WORDS), (cells.texts, SMALLEST_TEXT)):
            longest = max(1, *map(len, texts.values()))  # all words may be empty
            size = min(text_size(ax), 0.8 * width / columns / (longest * GLYPH), 0.7 * height / rows)  # digits are wide
            if size >= smallest:
                for (row, column), text in texts.items():
                    color: Any = colors.cmap(colors.norm(cells.values[row, column]))
                    write_text(ax, column, row, text, size=size, color=readable_ink(to_hex(color)), zorder=3)
                break
