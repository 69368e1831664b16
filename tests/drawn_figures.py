"""Faults of a drawn figure: faint or overlapping text, missing ticks, cut marks, categories equal in gray."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from lorascope.charts.chart import Drawable
from lorascope.charts.theme import contrast

DPI = 150  # a point is about two pixels
TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0  # Web Content Accessibility Guidelines 2.2, criteria 1.4.3 and 1.4.11
GRAY_STEP = 10.0  # difference of CIE lightness, 0 to 100
GROUND = 0.15  # fraction of the box of a text that a color fills if the text is on it
SLACK = 1.0  # pixels: positions are rounded


class DrawnText(NamedTuple):
    """Line of text with its color, opacity and box in pixels from the upper left corner."""

    text: str
    color: str
    alpha: float
    box: Bbox


class TextRecorder(RendererAgg):
    """Renderer that records texts and draws everything else, so that its pixels are what is under the texts."""

    def __init__(self, figure: Figure) -> None:
        super().__init__(*figure.bbox.size, figure.dpi)
        self.recorded_texts: list[DrawnText] = []

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None) -> None:
        width, height, descent = self.get_text_width_height_descent(s, prop, ismath)
        box = Bbox.from_extents(x, y - height + descent, x + width, y + descent)
        if angle == 90:
            box = Bbox.from_extents(x - height + descent, y - width, x + descent, y)
        if s.strip():
            self.recorded_texts.append(DrawnText(s, to_hex(gc.get_rgb()), gc.get_alpha(), box))


def faults(name: str, drawable: Drawable, **how: Any) -> list[str]:
    """Draw with matplotlib, ``how`` as ``mpl`` does, and return the faults, one line each with ``name``."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        lines = list(figure_faults(drawable.mpl(**how)))
    lines += [str(warning.message) for warning in raised]  # such as axes without room
    settings = ", ".join(map(str, how.values()))
    return [f"{name} ({settings}): {line}" for line in dict.fromkeys(lines)]


def figure_faults(figure: Any) -> Iterator[str]:
    """Yield the faults of a figure of matplotlib."""
    figure.set_dpi(DPI)
    renderer = TextRecorder(figure)
    figure.draw(renderer)
    texts, pixels = renderer.recorded_texts, np.asarray(renderer.buffer_rgba())[..., :3]
    yield from _faint_texts(texts, pixels)
    yield from _text_collisions(texts)
    yield from _texts_out_of_place(texts, figure)
    for ax in figure.axes:
        if not hasattr(ax, "_colorbar"):
            yield from _faint_marks(ax)
            yield from _missing_ticks(ax)
            yield from _cut_marks(ax)
    for legend in _legends(figure):
        yield from _alike_in_gray(legend)


def _faint_texts(texts: Sequence[DrawnText], pixels: np.ndarray) -> Iterator[str]:
    """Compare each text with the colors that fill a part of its box."""
    for text in texts:
        (left, top), (right, bottom) = np.rint(text.box.get_points()).astype(int).clip(0).tolist()
        region = pixels[top:bottom, left:right].reshape(-1, 3)
        for ground, count in Counter(map(tuple, region.tolist())).most_common(3):
            if count < GROUND * len(region):
                break
            under: Any = np.array(ground) / 255
            blended: Any = np.array(to_rgb(text.color)) * text.alpha + under * (1 - text.alpha)
            ratio = contrast(to_hex(blended), to_hex(under))
            if ratio < TEXT_CONTRAST:
                yield f"text {text.text!r} has a contrast of {ratio:.1f} to {to_hex(under)}"


def _text_collisions(texts: Sequence[DrawnText]) -> Iterator[str]:
    for text, other in combinations(texts, 2):
        if _overlap(text.box, other.box):
            yield f"texts {text.text!r} and {other.text!r} overlap"


def _texts_out_of_place(texts: Sequence[DrawnText], figure: Any) -> Iterator[str]:
    """Find text outside the figure, and other text in the box of a legend."""
    width, height = figure.bbox.size
    for text in texts:
        (left, top), (right, bottom) = text.box.get_points()
        if min(left, top) < -SLACK or right > width + SLACK or bottom > height + SLACK:
            yield f"text {text.text!r} is outside the figure"
    for legend in _legends(figure):
        own_lines = set()
        for label in (legend.get_title(), *legend.get_texts()):
            own_lines |= set(label.get_text().replace(r"\$", "$").splitlines())
        left, bottom, right, top = legend.get_window_extent().extents
        frame = Bbox.from_extents(left, height - top, right, height - bottom)
        for drawn in texts:
            if drawn.text not in own_lines and _overlap(drawn.box, frame):
                yield f"text {drawn.text!r} is on the legend"


def _overlap(box: Bbox, other: Bbox) -> bool:
    common = Bbox.intersection(box, other)
    return common is not None and min(common.size) > SLACK


def _legends(figure: Any) -> list[Any]:
    return [*figure.legends, *(legend for ax in figure.axes if (legend := ax.get_legend()))]


def _faint_marks(ax: Any) -> Iterator[str]:
    """Compare lines, dots and bars with the color of the axes; bands and heat maps are read by their edges."""
    ground = to_hex(ax.get_facecolor())
    faint = {color for color in _mark_colors(ax) if contrast(color, ground) < MARK_CONTRAST}
    if faint:
        least = min(faint, key=lambda color: contrast(color, ground))
        yield f"{len(faint)} colors of marks are faint, such as {least}: contrast {contrast(least, ground):.1f}"


def _mark_colors(ax: Any) -> Iterator[str]:
    ground = to_hex(ax.get_facecolor())
    for line in ax.lines:
        if len(line.get_xdata()):
            yield to_hex(line.get_color())
    for collection in ax.collections:
        if isinstance(collection, LineCollection):
            yield from map(to_hex, collection.get_color())
        elif isinstance(collection, PathCollection) and len(collection.get_offsets()):
            faces = set(map(to_hex, collection.get_facecolor()))
            # A dot without a face is its outline.
            yield from faces - {ground} or set(map(to_hex, collection.get_edgecolor()))
    for bar in _bars(ax):
        yield to_hex(bar.get_facecolor())


def _bars(ax: Any) -> list[Rectangle]:
    return [bar for container in ax.containers for bar in container if isinstance(bar, Rectangle)]


def _missing_ticks(ax: Any) -> Iterator[str]:
    """Find categories with a mark and without a tick; between ticks of evenly spaced numbers, some may be left out."""
    drawn = _drawn_positions(ax)
    for axis, positions, limits in ((ax.xaxis, drawn[0], ax.get_xlim()), (ax.yaxis, drawn[1], ax.get_ylim())):
        low, high = sorted(limits)
        if low != -0.5 or high % 1 != 0.5:  # an axis of numbers
            continue
        labels = {}
        for tick in axis.get_major_ticks():
            if tick.label1.get_text():
                labels[float(tick.get_loc())] = tick.label1.get_text()
        for position in sorted(set(np.rint(positions)) - set(labels)):
            if low < position < high and not _is_counted(position, labels):
                yield f"no tick on {axis.axis_name} for category {position:g}, labels are {', '.join(labels.values())}"


def _is_counted(position: float, labels: dict[float, str]) -> bool:
    """Return whether a reader can count from the labels next to a position, which are evenly spaced numbers."""
    numbers = {}
    for place, label in labels.items():
        if re.fullmatch(r"[-−]?[\d.]+", label):
            numbers[place] = float(label.replace("−", "-"))
    places = sorted(numbers)
    if len(places) < 2:
        return False
    gaps, steps = np.diff(places), np.diff([numbers[place] for place in places])
    slopes = steps / gaps
    # Two labels do not show whether the numbers between them are evenly spaced, unless these are consecutive.
    if not np.allclose(slopes, slopes[0]) or (len(slopes) == 1 and abs(slopes[0]) != 1):
        return False
    reach = gaps.max() - 0.5 * (gaps.max() == 1)  # between labels of neighbors, none is left out
    return bool(places[0] - reach <= position <= places[-1] + reach)


def _drawn_positions(ax: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of all marks on x and on y."""
    points = [np.empty((0, 2))]
    for line in _data_lines(ax):
        points.append(np.ma.filled(np.ma.asarray(line.get_xydata(), float), np.nan))
    for collection in ax.collections:
        if isinstance(collection, PathCollection):
            points.append(np.ma.filled(np.ma.asarray(collection.get_offsets(), float), np.nan))
    for bar in _bars(ax):
        points.append(np.array([[bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2]]))
    for image in ax.images:
        rows, columns = np.nonzero(~np.ma.getmaskarray(np.ma.masked_invalid(image.get_array())))
        points.append(np.column_stack([columns, rows]).astype(float))
    joined = np.concatenate(points)
    x, y = joined[np.isfinite(joined).all(axis=1)].T
    return x, y


def _data_lines(ax: Any) -> list[Any]:
    """Return the lines through data; rules are in other coordinates."""
    return [line for line in ax.lines if line.get_transform() == ax.transData and len(line.get_xdata())]


def _cut_marks(ax: Any) -> Iterator[str]:
    """Find marks that reach over the limits of the axes, which cut them."""
    frame = ax.get_window_extent()
    for kind, boxes in _mark_boxes(ax):
        boxes = boxes[np.isfinite(boxes).all(axis=1)]
        over = [frame.x0 - boxes[:, 0], frame.y0 - boxes[:, 1], boxes[:, 2] - frame.x1, boxes[:, 3] - frame.y1]
        cut = np.max(over, axis=0) > SLACK
        if cut.any():
            yield f"{int(cut.sum())} of {len(boxes)} {kind} are cut by up to {np.max(over):.0f} pixels"


def _mark_boxes(ax: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield kind and boxes (left, bottom, right, top) of the marks that the axes clip, in pixels from below."""
    for line in _data_lines(ax):
        if line.get_clip_on():
            yield "points of a line", _boxes_at(ax, np.ma.filled(np.ma.asarray(line.get_xydata(), float), np.nan))
    for collection in ax.collections:
        if not collection.get_clip_on():
            continue
        if isinstance(collection, PathCollection):
            offsets = np.ma.filled(np.ma.asarray(collection.get_offsets(), float), np.nan)
            (path,), sizes = collection.get_paths(), np.sqrt(collection.get_sizes()) * DPI / 72
            radii = path.get_extents().size / 2 * np.broadcast_to(sizes, len(offsets))[:, None]
            yield "dots", _boxes_at(ax, offsets, radii)
        elif isinstance(collection, LineCollection):
            for segment in collection.get_segments():
                yield "ends of an error bar", _boxes_at(ax, np.asarray(segment, float))
        elif isinstance(collection, PolyCollection):
            for path in collection.get_paths():
                yield "corners of a band", _boxes_at(ax, np.asarray(path.vertices))
    if bars := _bars(ax):
        yield "bars", np.array([bar.get_window_extent().extents for bar in bars])


def _boxes_at(ax: Any, points: np.ndarray, radii: np.ndarray | float = 0.0) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        centers = ax.transData.transform(points.reshape(-1, 2))
    return np.concatenate([centers - radii, centers + radii], axis=1)


def _alike_in_gray(legend: Any) -> Iterator[str]:
    """Find categories of a legend whose lightness is about the same, and whose dash and marker or hatch are equal."""
    entries = []
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        if isinstance(handle, Line2D):
            style: Any = (handle.get_marker(), handle._unscaled_dash_pattern, handle.get_fillstyle())
            entries.append((text.get_text(), to_hex(handle.get_color()), style))
        else:
            entries.append((text.get_text(), to_hex(handle.get_facecolor()), handle.get_hatch()))
    for (name, color, style), (other_name, other_color, other_style) in combinations(entries, 2):
        step = abs(lightness(color) - lightness(other_color))
        if style == other_style and step < GRAY_STEP:
            yield f"{name!r} and {other_name!r} differ in gray by {step:.0f} of 100"


def lightness(color: str) -> float:
    """Return the lightness of a color, 0 to 100.

    Source: CIE 015:2018, L* of the color space L*a*b*.
    """
    luminance = contrast(color, "#000000") * 0.05 - 0.05
    if luminance <= (6 / 29) ** 3:
        return luminance * (29 / 3) ** 3
    return float(116 * np.cbrt(luminance) - 16)
