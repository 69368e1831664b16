"""Layout shared by both renderers: frames, axis limits, legend entries, color bars and captions of a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.charts.chart import Chart, Drawable
from lorascope.charts.geometry import Panel, group
from lorascope.charts.marks import Bar, Heat
from lorascope.charts.scales import (
    Limits,
    Ramp,
    Scale,
    categories,
    color_columns,
    encoded,
    scale,
    style_columns,
    to_floats,
)
from lorascope.charts.theme import RED_BLUE, STYLES, VIRIDIS, Theme
from lorascope.files.printable import short_name

PAD = 0.04  # fraction of the range left free at each end of a numeric axis
LOOKS = {"line": ("line", "dash"), "point": ("dot", "shape")}  # kind of legend symbol, and its style


@dataclass(frozen=True)
class Entry:
    """Legend entry in the plan of a figure; ``style`` names a dash pattern or the shape of a dot, "" for a patch."""

    label: str
    color: str
    kind: str
    style: str
    group: str


@dataclass(frozen=True)
class FigurePlan:
    """Plan of a figure, ready to be drawn; ``rows`` contains the numbers of the panels row by row."""

    panels: list[Panel]
    rows: list[list[int]]
    frames: list[Any]
    frame_label: str
    entries: list[Entry]
    legend_title: str
    ramps: list[Ramp]
    title: str
    caption: str
    theme: Theme


def plan_figure(drawable: Drawable, theme: Theme) -> FigurePlan:
    """Plan a figure: compute everything that does not depend on the renderer."""
    charts = drawable.charts()
    framed = [chart.data[chart.frame] for chart in charts if chart.frame is not None]
    labels = list(dict.fromkeys(str(column.name) for column in framed))
    if len(labels) > 1:
        raise ValueError(f"panels must have the same frame column, got {', '.join(labels)}")
    frames = list(categories(framed))
    colors, styles, ramps = color_columns(charts), style_columns(charts), _heat_ramps(charts)
    heats = {number: ramp for ramp in ramps for number in ramp.views}
    panels = [
        Panel(number, chart, scale(chart, "x"), scale(chart, "y"), colors, styles, theme, heats.get(number))
        for number, chart in enumerate(charts)
    ]
    for column, scale_colors in colors.items():
        if scale_colors.limits is not None:
            views = [number for number, chart in enumerate(charts) if column in encoded([chart], "color")]
            ramps.append(Ramp(len(ramps), scale_colors.label, theme.ramp, scale_colors.limits, views))
    numbers = iter(range(len(charts)))
    titles = {chart.color_label for chart in charts}
    captions = list(dict.fromkeys(chart.caption for chart in charts if chart.caption))
    if len(captions) > 1:
        captions = [f"{chart.title}: {chart.caption}".removeprefix(": ") for chart in charts if chart.caption]
    return FigurePlan(
        panels=_set_limits(panels, frames),
        rows=[[next(numbers) for _ in row] for row in drawable.rows()],
        frames=frames,
        frame_label="".join(labels),
        entries=_merge_entries([entry for panel in panels for entry in _entries(panel)]),
        legend_title=titles.pop() if len(titles) == 1 else "",
        ramps=ramps,
        title=charts[0].title if len(charts) == 1 else "",
        caption="\n".join(captions),
        theme=theme,
    )


def _set_limits(panels: Sequence[Panel], frames: Sequence[Any]) -> list[Panel]:
    """Return panels with limits that fit every frame.

    A categorical y axis runs downwards. Numeric axes with the same label and scale share their limits, unless
    ``Axis.limits`` sets them.
    """
    reaches = [[shape.reach() for frame in frames or [None] for shape in panel.shapes(frame)] for panel in panels]

    def limits(panel: Panel, letter: str) -> Limits:
        axis_scale: Scale = getattr(panel, letter)
        if axis_scale.categories is not None:
            last = max(len(axis_scale.categories), 1) - 0.5  # an axis without categories still needs a length
            return (-0.5, last) if letter == "x" else (last, -0.5)
        kin = [other for other in panels if other is panel or _is_same_axis(axis_scale, getattr(other, letter))]
        axis = "xy".index(letter)
        ends = [values for other in kin for reach in reaches[other.number] for values in reach[axis]]
        numbers = np.concatenate([np.empty(0), *(np.ravel(values) for values in ends if values is not None)])
        anchored = any(isinstance(mark, Bar) for other in kin for mark in other.chart.marks)
        start, stop = axis_scale.axis.limits or (None, None)
        low, high = _pad_ends(numbers, axis_scale.log, anchored)
        return (low if start is None else float(start), high if stop is None else float(stop))

    return [
        replace(panel, x=replace(panel.x, limits=limits(panel, "x")), y=replace(panel.y, limits=limits(panel, "y")))
        for panel in panels
    ]


def _is_same_axis(first: Scale, other: Scale) -> bool:
    """Return whether two numeric axes have the same label and scale."""
    labelled = first.axis.label != "" and first.axis.label == other.axis.label
    return labelled and other.categories is None and first.log == other.log


def _pad_ends(numbers: Float[np.ndarray, "n"], log: bool, anchored: bool) -> Limits:
    """Return limits around numbers; on an axis with bars, a limit at zero is not padded."""
    numbers = numbers[numbers > 0] if log else numbers[np.isfinite(numbers)]
    if not numbers.size:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = float(numbers.min()), float(numbers.max())
    if log:
        # At most a factor of 1000, even if the values are hundreds of decades apart.
        pad = min(high**PAD / low**PAD, 1e3) if high > low else 2.0
        return max(low / pad, np.finfo(float).tiny), high * pad
    pad = PAD * ((high - low) or abs(high) or 1.0)
    return low if anchored and low == 0 < high else low - pad, high if anchored and high == 0 > low else high + pad


def _entries(panel: Panel) -> Iterator[Entry]:
    """Yield the legend entries of a panel: colors that no axis or color bar shows, then styles."""
    for column, uses in encoded([panel.chart], "color").items():
        colors = panel.colors[column]
        axes = [mark.columns().get(letter) for _, mark in uses for letter in "xy"]
        if colors.limits is not None or column in axes:
            continue
        for value in colors.categories:
            for _, mark in uses:
                if (panel.chart.table(mark)[column] == value).any():
                    kind, encoding = LOOKS.get(mark.kind, ("patch", ""))
                    styled = mark.columns().get(encoding) == column
                    first = STYLES.get(encoding, [""])[0]
                    style = panel.style(mark, encoding, {column: value}) if styled else first
                    yield Entry(short_name(value), colors.of(value, panel.theme), kind, style, group({column: value}))
    for kind, encoding in LOOKS.values():
        for column, ((_, mark), *_) in encoded([panel.chart], encoding).items():
            if column != mark.columns().get("color"):
                for value in panel.order(mark, column):
                    key = {column: value}
                    yield Entry(short_name(value), panel.theme.ink, kind, panel.style(mark, encoding, key), group(key))


def _merge_entries(entries: Sequence[Entry]) -> list[Entry]:
    """Merge entries with equal name, color and group: a line replaces a dot, and a dot a patch.

    A single entry needs no legend.
    """
    kinds = ("line", "dot", "patch")
    best: dict[tuple[str, str, str], Entry] = {}
    for entry in entries:
        old = best.setdefault((entry.label, entry.color, entry.group), entry)
        if kinds.index(entry.kind) < kinds.index(old.kind):
            best[entry.label, entry.color, entry.group] = entry
    return list(best.values()) if len(best) > 1 else []


def _heat_ramps(charts: Sequence[Chart]) -> list[Ramp]:
    """Return the color bars of heat maps; those with the same label, scale and limits share one and its ends."""
    shared: dict[tuple[Any, ...], list[tuple[int, Heat]]] = {}
    for view, chart in enumerate(charts):
        for mark in chart.marks:
            if isinstance(mark, Heat):
                # Heat maps without a label may show different quantities, so each gets its own color bar.
                same = (mark.label,) if mark.label else (view, "")
                shared.setdefault((*same, mark.scale, tuple(mark.limits or ())), []).append((view, mark))
    ramps = []
    for number, uses in enumerate(shared.values()):
        views, mark = [view for view, _ in uses], uses[0][1]
        values = np.concatenate([to_floats(charts[view].table(heat)[heat.value]) for view, heat in uses])
        colors = RED_BLUE if mark.scale == "diverging" else VIRIDIS
        ramps.append(Ramp(number, mark.label, colors, _heat_limits(mark, values), views))
    return ramps


def _heat_limits(mark: Heat, numbers: Float[np.ndarray, "n"]) -> Limits:
    """Return the values at both ends of a color scale."""
    if mark.limits is not None:
        return float(mark.limits[0]), float(mark.limits[1])
    numbers = numbers[np.isfinite(numbers)]
    if mark.scale == "diverging":
        # Equal distances from zero keep zero at the neutral color.
        far = float(np.abs(numbers).max(initial=0.0)) or 1.0
        return -far, far
    if not numbers.size:
        return 1.0, 10.0
    low, high = float(numbers.min()), float(numbers.max())
    return low, high if low < high else low + 1.0
