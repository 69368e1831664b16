"""Charts as matplotlib figures: small multiples for frames, one legend, and the caption below.

Figures are created without pyplot and in a temporary style: the settings and the current figure of the caller do not
change.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from lorascope.array_types import Float
from lorascope.charts.chart import Drawable
from lorascope.charts.figure_plan import Entry, FigurePlan, plan_figure
from lorascope.charts.geometry import Area, Bars, Cells, Curve, Dots, Errors, Panel, Ruler, Shape, Words
from lorascope.charts.scales import Ramp, Scale
from lorascope.charts.text_wrapping import GLYPH, count_lines, wrap_text
from lorascope.charts.theme import FAINT, MUTED, STYLES, WIDTHS, Theme, is_dark, theme
from lorascope.files.printable import printable_lines

_PATTERNS = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (8, 2)), (0, (8, 2, 1, 2, 1, 2)))
DASHES: dict[str, Any] = dict(zip(STYLES["dash"], _PATTERNS, strict=True))
MARKERS = dict(zip(STYLES["shape"], "os^DvPX", strict=True))
MARKERS |= {"circle-open": "o", "line-ns-open": "|"}
DOT = 4.0  # diameter of a dot in points
LARGEST = 11.0  # diameter in points of the largest dot, if the area shows a column
FEW = 200  # a logarithmic axis whose ends have a smaller ratio needs ticks between powers of ten
# Multiples of powers of ten for these ticks, from most to fewest; all are for axes with fewer than two of the first.
BETWEEN, ALL = ((1, 2, 5), (1, 3), (1,)), tuple(range(1, 10))
SMALLEST_TEXT = 4.0  # points; numbers that only fit at a smaller size are omitted
SMALLEST_WORDS = 5.0  # points; words that only fit at a smaller size are replaced by the numbers
FRAMES = 8  # maximum number of small multiples
ACROSS = {"column": 2, "page": 4}  # small multiples per row
SHAPE = 0.68  # height of a panel as a fraction of its width
LABELS = 0.7  # inches for the title and labels of an axis
_NAMES_SHARE = 0.4  # of the width of a figure: room for the names on a vertical axis
_LINE = 1.2  # height of a line of text, in font sizes


@dataclass(frozen=True)
class _GridPlace:
    """Row and columns (from ``start`` to before ``stop``) of one frame of a panel in the grid of a figure."""

    panel: int
    frame: Any
    row: int
    start: int
    stop: int


def to_matplotlib(drawable: Drawable, name: str | None = None, width: str | None = None) -> Figure:
    """Draw on a new matplotlib figure; see :meth:`Drawable.mpl`."""
    settled = plan_figure(drawable, theme(name or "light"))
    if not width:
        width = "column" if len(settled.panels) == 1 and not settled.frames else "page"
    if width not in WIDTHS:
        sizes = " or ".join(f"{name!r} ({size} in)" for name, size in WIDTHS.items())
        raise ValueError(f"width must be {sizes}, got {width!r}")
    with style(settled.theme):
        return _compose(settled, _lay_out_grid(settled, ACROSS[width]), WIDTHS[width])


def write(
    drawable: Drawable, kind: str, name: str, width: str | None, metadata: dict[str, Any], dpi: float | None = None
) -> bytes:
    """Return the content of a file ("pdf", "svg" or "png") that matplotlib draws, with metadata of that format."""
    drawn_figure, file = to_matplotlib(drawable, name, width), io.BytesIO()
    with style(theme(name)):
        drawn_figure.savefig(file, format=kind, metadata=metadata, dpi=dpi)
    return file.getvalue()


def draw_onto(ax: Axes, drawable: Drawable, name: str | None = None) -> Axes:
    """Draw on the caller's matplotlib axes, in the caller's style."""
    settled = plan_figure(drawable, theme(name or "light"))
    if len(settled.panels) > 1 or settled.frames:
        raise ValueError("cannot draw panels or frames on ax: pass a single chart, such as chart.at(frame)")
    (panel,) = settled.panels
    draw(ax, panel)
    ax.set_title(_escape_dollar(settled.title))
    if settled.entries:
        ax.legend(handles=list(map(_handle, settled.entries)), title=_escape_dollar(settled.legend_title))
    for ramp in settled.ramps:
        ax.figure.colorbar(_color_scale(ramp), ax=ax, label=_escape_dollar(ramp.label))
    _label_categories(ax, panel)
    _write_cell_texts(ax, panel)
    return ax


def style(look: Theme) -> Any:
    """Return a context with matplotlib's own defaults and the sizes and colors of a theme."""
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    ground = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    texts = ("font.size", "axes.labelsize", "axes.titlesize", "figure.titlesize")
    settings: dict[str, Any] = {
        **dict.fromkeys(ink, look.ink),
        **dict.fromkeys(ground, look.background),
        **dict.fromkeys((*texts, "legend.fontsize", "legend.title_fontsize"), look.size),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 0.93 * look.size),
        **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
        **dict.fromkeys(("xtick.minor.size", "ytick.minor.size"), 1.5),
        **{"axes.titlelocation": "left", "axes.titlepad": 4.0, "axes.labelpad": 2.5, "figure.titleweight": "bold"},
        **{"lines.linewidth": 1.2, "hatch.linewidth": 0.5, "legend.frameon": False, "savefig.dpi": 300},
        # Embed TrueType fonts, since many journals reject type 3.
        "pdf.fonttype": 42,
        # With fixed ids, equal figures give equal bytes.
        "svg.hashsalt": "lorascope",
    }
    # Reset first, so that the caller's settings have no effect.
    return matplotlib.style.context(settings, after_reset=True)


def _lay_out_grid(settled: FigurePlan, across: int) -> list[_GridPlace]:
    """Place the panels as arranged or, with frames, the frames of each panel in rows of ``across``."""
    rows: list[tuple[int, Iterable[tuple[int, Any]]]] = []  # number of equal columns, panels and frames in them
    if settled.frames:
        frames, max_frames = settled.frames, across
        if len(settled.panels) == 1:
            max_frames = FRAMES
        if len(frames) > max_frames:
            # Evenly spaced frames, including the first and the last.
            frames = [frames[round(index * (len(frames) - 1) / (max_frames - 1))] for index in range(max_frames)]
        across = min(across, len(frames))
        for panel in settled.panels:
            if panel.chart.frame is None:
                rows.append((1, [(panel.number, None)]))
                continue
            for start in range(0, len(frames), across):
                rows.append((across, product([panel.number], frames[start : start + across])))
    else:
        for row in settled.rows:
            rows.append((max(len(row), settled.columns), product(row, [None])))
    # A common multiple lets rows with different numbers of panels share one grid.
    columns = math.lcm(*(count for count, _ in rows))
    cells = []
    for number, (count, members) in enumerate(rows):
        width = columns // count
        for index, (panel_number, frame) in enumerate(members):
            cells.append(_GridPlace(panel_number, frame, number, index * width, (index + 1) * width))
    return cells


def _compose(settled: FigurePlan, cells: list[_GridPlace], width: float) -> Figure:
    """Draw axes, legend, color bars and caption on a figure ``width`` inches wide and as high as necessary."""
    size = settled.theme.size
    columns = max(cell.stop for cell in cells)
    widths = {cell: width * (cell.stop - cell.start) / columns for cell in cells}
    heights = [0.0] * (cells[-1].row + 1)
    for cell in cells:
        usual, scale = max(1.4, SHAPE * min(widths[cell], 4.5)), settled.panels[cell.panel].y
        lines = LABELS + len(scale.names) * 1.45 * size / 72
        heights[cell.row] = max(heights[cell.row], scale.height(usual, lines, 0.95 * widths[cell], 0.75 * usual))
    drawn_figure = Figure(figsize=(width, sum(heights)))
    # The canvas is necessary to measure text.
    renderer = FigureCanvasAgg(drawn_figure).get_renderer()
    grid = drawn_figure.add_gridspec(len(heights), columns, height_ratios=heights)
    panels = []
    for cell in cells:
        ax, panel = drawn_figure.add_subplot(grid[cell.row, cell.start : cell.stop]), settled.panels[cell.panel]
        panels.append((cell, ax, panel))
        draw(ax, panel, cell.frame)
        ax.set_xlabel(_escape_dollar(wrap_text(panel.x.axis.label, 0.8 * 72 * widths[cell], size)))
        ax.set_ylabel(_escape_dollar(wrap_text(panel.y.axis.label, 72 * 0.8 * heights[cell.row], size)))
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
        bar = drawn_figure.colorbar(_color_scale(ramp), ax=painted, fraction=0.06, pad=0.02, aspect=22)
        bar.set_label(_escape_dollar(wrap_text(ramp.label, 72 * 0.8 * sum(heights), size)))
        bar.outline.set_linewidth(0.4)
        bar.locator = MaxNLocator("auto", steps=[1, 2, 5, 10])  # no steps of 2.5: ranks and counts are integers
    title = wrap_text(settled.title, 72 * width, 1.1 * size)
    if title:
        drawn_figure.suptitle(_escape_dollar(title), x=0.01, ha="left")
    # Wrapped here, because matplotlib wraps differently at every resolution.
    caption = _escape_dollar(_break_lines(settled.caption, 0.98 * 72 * width, size))
    foot: list[Any] = [drawn_figure.text(0.01, 0.0, caption, ha="left", va="bottom", in_layout=False)]
    if settled.entries:
        foot.append(_draw_legend(drawn_figure, settled, width))
    head = count_lines(title) * 1.6 * size / 72
    turned = 0.0
    for _ in range(2):  # twice: y labels take width from x, titles and vertical names take height
        _stack_foot(drawn_figure, sum(heights) + head + turned, foot, renderer)
        for cell, ax, panel in panels:
            titles = []
            if len(settled.panels) > 1 and panel.chart.title:
                titles.append(panel.chart.title)
            if cell.frame is not None:
                titles.append(f"{settled.frame_label} {cell.frame}")
            room = 1.1 * _size_in_points(ax)[0]
            ax.set_title(_escape_dollar(wrap_text(", ".join(titles), room, size)))
        depths = [0.0] * len(heights)
        for cell, ax, panel in panels:
            depths[cell.row] = max(depths[cell.row], _label_categories(ax, panel))
        turned = sum(depths) / 72
    _stack_foot(drawn_figure, sum(heights) + head + turned, foot, renderer)
    for _, ax, panel in panels:
        _label_categories(ax, panel)  # all may fit now that vertical names have room
    engine: Any = drawn_figure.get_layout_engine()
    engine.execute(drawn_figure)  # these may take width from the cells
    for cell, ax, panel in panels:
        _write_cell_texts(ax, panel, cell.frame)
    return drawn_figure


def _draw_legend(drawn_figure: Figure, settled: FigurePlan, width: float) -> Legend:
    """Draw the legend with as many entries per row as fit, at least one."""
    size = settled.theme.size
    entries = [replace(entry, label=wrap_text(entry.label, 72 * width - 4 * size, size)) for entry in settled.entries]
    widths = [(max(map(len, entry.label.split("\n"))) * GLYPH + 4.0) * size for entry in entries]
    for depth in range(1, len(entries) + 1):
        columns = [widths[start : start + depth] for start in range(0, len(widths), depth)]
        if sum(map(max, columns)) <= 72 * width:
            break
    gaps: dict[str, Any] = {"borderpad": 0.2, "columnspacing": 1.2, "handlelength": 1.8}
    title = _escape_dollar(settled.legend_title) or None
    handles = list(map(_handle, entries))
    legend = drawn_figure.legend(handles=handles, title=title, loc="lower center", ncols=len(columns), **gaps)
    legend.set_in_layout(False)
    return legend


def _stack_foot(drawn_figure: Figure, height: float, foot: list[Any], renderer: Any) -> None:
    """Stack caption and legend at the bottom, and lay out the panels in the ``height`` inches above them."""
    gap, used = 0.08, 0.04
    depths = [artist.get_window_extent(renderer).height / drawn_figure.dpi + gap for artist in foot]
    total = height + sum(depths) + gap
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
    label = _escape_dollar(entry.label)
    if entry.kind == "patch":
        return Patch(color=entry.color, label=label, linewidth=0)
    if entry.kind == "line":
        return Line2D([], [], color=entry.color, label=label, linestyle=DASHES[entry.style])
    look: dict[str, Any] = {"marker": MARKERS.get(entry.style), "markersize": DOT, "linestyle": ""}
    if entry.style == "circle-open":
        look["fillstyle"] = "none"
    return Line2D([], [], color=entry.color, label=label, **look)


def draw(ax: Axes, panel: Panel, frame: Any = None) -> None:
    """Draw one frame of a panel with matplotlib; names and cell texts are written once the size is known."""
    for layer, shape in enumerate(panel.shapes(frame)):
        # Above the grid, and in the order of the marks.
        _draw_shape(ax, shape, panel, 2 + layer / 1000)
    for axis, scale in ((ax.xaxis, panel.x), (ax.yaxis, panel.y)):
        axis.set_label_text(_escape_dollar(scale.axis.label))
        if scale.log:
            ax.set(**{f"{axis.axis_name}scale": "log"})
            if _is_short(scale):
                axis.set_major_locator(LogLocator(subs=BETWEEN[0]))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        elif scale.categories is None and scale.is_integer:
            axis.set_major_locator(MaxNLocator("auto", integer=True))
        if scale.categories is None:
            axis.grid(True, color=panel.theme.grid, linewidth=0.5)
        ax.set(**{f"{axis.axis_name}lim": scale.limits})
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _label_categories(ax: Axes, panel: Panel) -> float:
    """Label the categories, as many as fit now; return the points below the axes that vertical names need."""
    depth = 0.0
    axes: tuple[Any, Any] = (ax.xaxis, ax.yaxis)
    for axis, scale, room in zip(axes, (panel.x, panel.y), _size_in_points(ax), strict=True):
        size = float(axis.get_major_ticks(1)[0].label1.get_fontsize())
        ticks = scale.ticks(room, size, across=axis.axis_name == "y")
        if ticks is not None:
            axis.set_minor_locator(NullLocator())
            labels = ticks.names
            if axis.axis_name == "y":
                width = 72 * ax.figure.bbox.width / ax.figure.dpi
                labels = [_fit_beside(name, _NAMES_SHARE * width, room / len(labels), size) for name in labels]
            rotation = 0
            if ticks.turned:
                rotation, depth = 90, max(map(len, ticks.names)) * GLYPH * size
            axis.set_ticks(ticks.positions, map(_escape_dollar, labels), rotation=rotation)
        elif _is_short(scale):
            _thin_ticks(axis, room, size)
    return depth


def _fit_beside(name: str, width: float, height: float, size: float) -> str:
    """Fold a name to a width, or cut it in its middle if its lines are higher than its place; all in points."""
    folded = wrap_text(name, width, size)
    if count_lines(folded) * _LINE * size <= max(height, _LINE * size):
        return folded
    length = max(8, int(width / (GLYPH * size))) - 1
    if len(name) <= length:
        return name
    return f"{name[: length - length // 2]}…{name[-(length // 2) :]}"


def _write_cell_texts(ax: Axes, panel: Panel, frame: Any = None) -> None:
    """Write the words of a heat map into its cells or, if these are not legible, the numbers, if they fit."""
    for cells in panel.shapes(frame):
        if not isinstance(cells, Cells) or cells.mark.text is None or not cells.texts:
            continue
        (rows, columns), (width, height) = cells.values.shape, _size_in_points(ax)
        colors = _color_scale(cells.ramp)
        words = {cell: cells.words.get(cell, number) for cell, number in cells.texts.items()}
        for texts, smallest in ((words, SMALLEST_WORDS), (cells.texts, SMALLEST_TEXT)):
            longest = max(map(len, texts.values()))
            size = min(_text_size(ax), 0.9 * width / columns / (longest * GLYPH), 0.7 * height / rows)
            if size >= smallest:
                for (row, column), text in texts.items():
                    color: Any = colors.cmap(colors.norm(cells.values[row, column]))
                    ink = "#ffffff" if is_dark(to_hex(color)) else "#000000"
                    _write(ax, column, row, text, size=size, color=ink, zorder=3)
                break


def _size_in_points(ax: Axes) -> tuple[float, float]:
    """Return the width and height of axes in points."""
    box, points = ax.get_window_extent(), 72.0 / ax.figure.dpi
    return box.width * points, box.height * points


def _text_size(ax: Axes) -> float:
    """Return the font size of text inside axes, slightly smaller than that of the axis labels."""
    return 0.9 * float(ax.xaxis.label.get_fontsize())


def _break_lines(text: str, room: float, size: float) -> str:
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


def _escape_dollar(text: str) -> str:
    """Escape text: a dollar sign does not start math, and a control character does not break an SVG."""
    return printable_lines(text).replace("$", r"\$")


def _color_scale(ramp: Ramp) -> ScalarMappable:
    """Return the mapping of values to the colors of a color bar, transparent for missing values."""
    colors = LinearSegmentedColormap.from_list(ramp.label or "ramp", ramp.colors).with_extremes(bad=(0, 0, 0, 0))
    return ScalarMappable(Normalize(*ramp.limits), colors)


def _is_short(scale: Scale) -> bool:
    return scale.log and bool(scale.limits[1] < FEW * scale.limits[0])


def _thin_ticks(axis: Any, room: float, size: float) -> None:
    """Set the ticks of a short logarithmic axis, as many as have room for their labels."""
    low, high = np.log(axis.get_view_interval())
    choices: Sequence[Sequence[int]] = BETWEEN
    if len(_log_ticks(low, high, BETWEEN[0])) < 2:
        choices = [ALL]
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


def _write(ax: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Write text centered at a position."""
    ax.text(x, y, _escape_dollar(text), ha="center", va="center", **style)


def _draw_shape(ax: Axes, shape: Shape, panel: Panel, zorder: float) -> None:
    match shape:
        case Curve():
            ax.plot(shape.x, shape.y, color=shape.color, linestyle=DASHES[shape.dash], zorder=zorder)
        case Area():
            ax.fill_between(shape.x, shape.low, shape.high, color=shape.color, alpha=FAINT, linewidth=0, zorder=zorder)
        case Errors():
            # From low to high, which need not contain the value.
            lines = ax.hlines if shape.lying else ax.vlines
            lines(shape.position, shape.low, shape.high, colors=shape.colors, linewidth=0.9, zorder=zorder)
        case Dots():
            if shape.errors:
                _draw_shape(ax, shape.errors, panel, zorder)
            areas: Any = DOT**2
            if shape.share is not None:
                areas = LARGEST**2 * shape.share
            look: dict[str, Any] = {"c": shape.colors, "edgecolors": panel.theme.background, "linewidths": 0.3}
            if shape.symbol == "circle-open":  # it covers its error bar
                look |= {"c": panel.theme.background, "edgecolors": shape.colors, "linewidths": 0.9}
            elif shape.symbol == "line-ns-open":  # it is as high as two dots, and has no edge
                look, areas = {"c": shape.colors, "linewidths": 1.2}, 4 * areas
            ax.scatter(shape.x, shape.y, areas, marker=MARKERS[shape.symbol], zorder=zorder, **look)
        case Bars():
            bars, start = (ax.barh, "left") if shape.lying else (ax.bar, "bottom")
            look = {start: shape.base, "color": shape.color}
            bars(shape.position, shape.top - shape.base, shape.width, zorder=zorder, **look)
            if shape.errors:
                _draw_shape(ax, shape.errors, panel, zorder)
        case Cells() if shape.values.size:
            if np.isnan(shape.values).any():
                rows, columns = shape.values.shape
                look = {"facecolor": panel.theme.missing, "edgecolor": panel.theme.hatch, "hatch": "////////"}
                ax.add_patch(Rectangle((-0.5, -0.5), columns, rows, linewidth=0, zorder=zorder, **look))
            colors = _color_scale(shape.ramp)
            look = {"cmap": colors.cmap, "norm": colors.norm, "aspect": "auto", "interpolation": "nearest"}
            ax.imshow(shape.values, zorder=zorder, **look)
        case Ruler():
            look = {"color": panel.theme.ink, "linewidth": 0.8, "linestyle": (0, (4, 2))}
            note: dict[str, Any] = {"size": _text_size(ax), "zorder": 4, "textcoords": "offset points"}
            text = _escape_dollar(shape.label)
            if shape.y is not None:
                ax.axhline(shape.y, zorder=zorder, **look)
                anchor, axis = (0.99, shape.y), ax.get_yaxis_transform()
                ax.annotate(text, anchor, (-2, 1), axis, ha="right", va="bottom", **note)
            if shape.x is not None:
                ax.axvline(shape.x, zorder=zorder, **look)
                across, shift = "left", 2
                if shape.x > np.mean(panel.x.limits):  # in the right half, the label extends to the left
                    across, shift = "right", -2
                anchor, axis = (shape.x, 0.98), ax.get_xaxis_transform()
                ax.annotate(text, anchor, (shift, -1), axis, ha=across, va="top", rotation=90, **note)
        case Words():
            for x, y, text in zip(shape.x, shape.y, shape.text, strict=True):
                if np.isfinite(x) and np.isfinite(y):
                    _write(ax, x, y, text, size=_text_size(ax), zorder=zorder, alpha=MUTED if shape.muted else 1.0)
