"""Layout shared by both renderers: frames, axis limits, legend entries, color bars and captions of a figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import attrgetter
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.charts.geometry import Numbers, Panel, drawn_number, group
from lorascope.charts.marks import Bar, Heat, Point
from lorascope.charts.math_text import math_to_unicode
from lorascope.charts.scales import (
    Limits,
    Ramp,
    Scale,
    bulk_limits,
    categories,
    color_columns,
    encoded,
    scale,
    style_columns,
    to_floats,
)
from lorascope.charts.theme import RED_BLUE, VIRIDIS, Theme
from lorascope.files.printable import short_name

PAD = 0.04  # fraction of the range left free at each end of a numeric axis
# Kind of legend symbol, and its style.
LOOKS = {"line": ("line", "dash"), "point": ("dot", "shape"), "bar": ("patch", "hatch")}
SYMBOLS = ("line", "dot", "patch", "band")  # a symbol replaces those after it, which show less
RAMPS = {"sequence": VIRIDIS, "diverging": RED_BLUE}


@dataclass(frozen=True)
class Entry:
    """Legend entry in the plan of a figure; ``style`` names a dash pattern, the shape of a dot or a hatch.

    A line whose dots have the same entry has their shape as ``marker``.
    """

    label: str
    color: str
    kind: str
    style: str
    group: str
    marker: str = ""


@dataclass(frozen=True)
class FigurePlan:
    """Plan of a figure, ready to be drawn; ``rows`` contains the numbers of the panels row by row.

    ``columns`` is the smallest number of places in a row, in print.
    """

    panels: list[Panel]
    rows: list[list[int]]
    columns: int
    frames: list[Any]
    frame_label: str
    entries: list[Entry]
    legend_title: str
    ramps: list[Ramp]
    title: str
    caption: str
    theme: Theme


def plan_figure(
    drawable: Drawable, theme: Theme, title: str | None = None, caption: bool = True, legend: bool = True
) -> FigurePlan:
    """Plan a figure: compute everything that does not depend on the renderer; see :meth:`Drawable.mpl`."""
    charts = drawable.panels
    framed = [chart.data[chart.frame] for chart in charts if chart.frame is not None]
    labels = list(dict.fromkeys(str(column.name) for column in framed))
    if len(labels) > 1:
        raise ValueError(f"panels must have the same frame column, got {', '.join(labels)}")
    frames = list(categories(framed))
    colors, styles, ramps = color_columns(charts), style_columns(charts), _heat_ramps(charts)
    heats: dict[int, Ramp] = {}
    for ramp in ramps:
        heats |= dict.fromkeys(ramp.views, ramp)
    panels = []
    for number, chart in enumerate(charts):
        x, y = scale(chart, "x"), scale(chart, "y")
        panels.append(Panel(number, chart, x, y, colors, styles, theme, heats.get(number)))
    for column, scale_colors in colors.items():
        if scale_colors.limits is not None:
            views = [number for number, chart in enumerate(charts) if column in encoded([chart], "color")]
            ramps.append(Ramp(len(ramps), scale_colors.label, theme.ramp, scale_colors.limits, views))
    numbers = iter(range(len(charts)))
    legend_titles = set(map(attrgetter("color_label"), charts))
    entries = _merge_entries(chain.from_iterable(map(panel_entries, panels)))
    if title is None:
        # Panels have their own titles as well.
        title = drawable.title if isinstance(drawable, Panels) else charts[0].title
    return FigurePlan(
        panels=_set_limits(panels, frames),
        rows=[list(islice(numbers, len(row))) for row in drawable.rows()],
        columns=drawable.columns if isinstance(drawable, Panels) else 1,
        frames=frames,
        frame_label="".join(labels),
        entries=entries if legend and len(entries) > 1 else [],  # a single entry needs no legend
        legend_title=legend_titles.pop() if len(legend_titles) == 1 else "",
        ramps=ramps,
        title=title,
        caption=math_to_unicode(join_captions(charts)) if caption else "",
        theme=theme,
    )


def join_captions(charts: Sequence[Chart]) -> str:
    """Join the captions of a figure; if they differ, the titles of the panels precede them."""
    captions, titled_captions = [], []
    for chart in charts:
        if chart.caption:
            captions.append(chart.caption)
            titled_captions.append(f"{chart.title}: {chart.caption}".removeprefix(": "))
    if len(set(captions)) > 1:
        return "\n".join(titled_captions)
    return "".join(captions[:1])


def _set_limits(panels: Sequence[Panel], frames: Sequence[Any]) -> list[Panel]:
    """Return panels with limits that fit every frame.

    A categorical y axis runs downwards. Numeric axes with the same label and scale share their limits, unless
    ``Axis.limits`` sets them.
    """
    ends = [_reached_ends(panel, frames or [None]) for panel in panels]

    def limits(panel: Panel, letter: str) -> Limits:
        axis_scale: Scale = getattr(panel, letter)
        if axis_scale.categories is not None:
            last = max(len(axis_scale.categories), 1) - 0.5  # an axis without categories still needs a length
            return (-0.5, last) if letter == "x" else (last, -0.5)
        numbers, anchored = [], False
        for other in panels:
            if other is panel or _is_same_axis(axis_scale, getattr(other, letter)):
                numbers += ends[other.number][letter]
                anchored = anchored or bool(other.chart.marks_of(Bar))
        low, high = _pad_ends(np.concatenate([np.empty(0), *numbers]), axis_scale.log, anchored)
        start, stop = axis_scale.axis.limits or (None, None)
        if start is not None:
            low = float(start)
        if stop is not None:
            high = float(stop)
        return low, high

    limited = []
    for panel in panels:
        x, y = replace(panel.x, limits=limits(panel, "x")), replace(panel.y, limits=limits(panel, "y"))
        limited.append(replace(panel, x=x, y=y))
    return limited


def _reached_ends(panel: Panel, frames: Sequence[Any]) -> dict[str, list[Numbers]]:
    """Return the outermost positions of all shapes of a panel on "x" and "y"."""
    ends: dict[str, list[Numbers]] = {"x": [], "y": []}
    for frame in frames:
        for shape in panel.shapes(frame):
            for letter, positions in zip("xy", shape.reach(), strict=True):
                ends[letter] += [np.ravel(position) for position in positions if position is not None]
    return ends


def _is_same_axis(first: Scale, other: Scale) -> bool:
    """Return whether two numeric axes have the same label and scale."""
    labelled = first.axis.label != "" and first.axis.label == other.axis.label
    return labelled and other.categories is None and first.log == other.log


def _pad_ends(numbers: Float[np.ndarray, "n"], log: bool, anchored: bool) -> Limits:
    """Return limits around numbers; on an axis with bars, a limit at zero is not padded."""
    is_drawn = np.isfinite(numbers)
    if log:
        is_drawn &= numbers > 0
    if not is_drawn.any():
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = float(numbers[is_drawn].min()), float(numbers[is_drawn].max())
    if log:
        pad = 2.0
        if high > low:
            # At most a factor of 1000, even if the values are hundreds of decades apart.
            pad = min(high**PAD / low**PAD, 1e3)
        return max(low / pad, np.finfo(float).tiny), high * pad
    pad = PAD * ((high - low) or abs(high) or 1.0)
    if anchored and low == 0 < high:
        return low, high + pad
    if anchored and high == 0 > low:
        return low - pad, high
    return low - pad, high + pad


def panel_entries(panel: Panel) -> list[Entry]:
    """Return the entries of a panel's legend."""
    return _merge_entries(_entries(panel))


def _entries(panel: Panel) -> Iterator[Entry]:
    """Yield the legend entries of a panel: labels, colors that no axis or color bar shows, then styles."""
    labeled_columns = set()
    for point in panel.chart.marks_of(Point):
        rows = panel.chart.table(point)
        if point.label and len(rows):
            color = panel.color(point, dict(rows.iloc[0]))
            yield Entry(point.label, color, "dot", panel.style(point, "shape", {}), point.label)
            labeled_columns.add(point.color)
    for column, uses in encoded([panel.chart], "color").items():
        colors = panel.colors[column]
        if (
            column in labeled_columns
            or colors.limits is not None
            or any(column in mark.distinct_columns("x", "y") for _, mark in uses)
        ):
            continue
        for value in colors.categories:
            key = {column: value}
            for _, mark in uses:
                if (panel.chart.table(mark)[column] == value).any():
                    kind, encoding = LOOKS.get(mark.kind, ("band", ""))
                    style = panel.style(mark, encoding, key)
                    yield Entry(short_name(value), panel.color(mark, key), kind, style, group(key))
    for kind, encoding in LOOKS.values():
        for column, ((_, mark), *_) in encoded([panel.chart], encoding).items():
            if column != mark.columns().get("color"):
                for value in panel.order(mark, column):
                    key = {column: value}
                    yield Entry(short_name(value), panel.theme.ink, kind, panel.style(mark, encoding, key), group(key))


def _merge_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Merge entries with equal name, color and group."""
    best: dict[tuple[str, str, str], Entry] = {}
    for entry in entries:
        key = entry.label, entry.color, entry.group
        first, second = sorted((best.get(key, entry), entry), key=lambda entry: SYMBOLS.index(entry.kind))
        if (first.kind, second.kind) == ("line", "dot"):
            first = replace(first, marker=second.style)
        best[key] = first
    return list(best.values())


def _heat_ramps(charts: Sequence[Chart]) -> list[Ramp]:
    """Return the color bars of heat maps; those with the same label, scale and limits share one and its ends."""
    shared: dict[tuple[Any, ...], list[tuple[int, Heat]]] = {}
    for view, chart in enumerate(charts):
        for mark in chart.marks_of(Heat):
            # Heat maps without a label may show different quantities, so each gets its own color bar.
            quantity = mark.label or view
            shared.setdefault((quantity, mark.scale, tuple(mark.limits or ())), []).append((view, mark))
    ramps = []
    for number, uses in enumerate(shared.values()):
        views, heats = zip(*uses, strict=True)
        values = np.concatenate([to_floats(charts[view].table(heat)[heat.value]) for view, heat in uses])
        values = values[np.isfinite(values)]
        limits = _heat_limits(heats[0], values)
        label, beyond = _label_outside(heats[0].label, values, limits)
        ramps.append(Ramp(number, label, RAMPS[heats[0].scale], limits, list(views), beyond))
    return ramps


def _label_outside(label: str, numbers: Float[np.ndarray, "n"], limits: Limits) -> tuple[str, str]:
    """Return the label of a color scale with the ends of numbers outside its limits, and at which ends these are."""
    low, high = min(numbers, default=limits[0]), max(numbers, default=limits[1])
    room = 1e-9 * (limits[1] - limits[0])  # rounding errors of limits that were computed from the numbers
    texts = [drawn_number(end, ".3g") for end in (low, high)]
    is_below, is_above = low < limits[0] - room, high > limits[1] + room
    if is_below and is_above:
        # Without a word, so that the label fits next to a panel of usual height.
        return f"{label} ({' to '.join(texts)})".strip(), "both"
    if is_below:
        return f"{label} (values down to {texts[0]})".strip(), "min"
    if is_above:
        return f"{label} (values up to {texts[1]})".strip(), "max"
    return label, "neither"


def _heat_limits(mark: Heat, numbers: Float[np.ndarray, "n"]) -> Limits:
    """Return the values at both ends of a color scale."""
    start, stop = mark.limits or (None, None)
    low, high = 1.0, 10.0
    if mark.scale == "diverging":
        # Equal distances from zero keep zero at the neutral color.
        far = (numbers.size and bulk_limits(np.abs(numbers))[1]) or 1.0
        low, high = -far, far
    elif numbers.size:
        low, high = bulk_limits(numbers)
    if start is not None:
        low = float(start)
    if stop is not None:
        high = float(stop)
    if high <= low:
        high = low + 1.0
    return low, high
