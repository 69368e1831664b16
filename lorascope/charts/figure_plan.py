"""Layout shared by both renderers: frames, legend entries, color bars and captions of a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lorascope.charts.axis_limits import Limits, ranges
from lorascope.charts.chart import Chart, Drawable, Heat, Mark
from lorascope.charts.geometry import Panel, group
from lorascope.charts.scales import categories, color_columns, scale, style_columns, to_floats
from lorascope.charts.theme import RED_BLUE, VIRIDIS, Theme
from lorascope.files.printable import short_name

LOOKS = {
    "line": ("line", "dash"),
    "point": ("dot", "shape"),
}  # legend symbol and style encoding; other marks are patches


@dataclass(frozen=True)
class View:
    """A panel and its axis limits."""

    panel: Panel
    x: Limits
    y: Limits


@dataclass(frozen=True)
class Entry:
    """A legend entry; ``style`` is the index of a dash pattern (kind "line") or of a shape (kind "dot")."""

    label: str
    color: str
    kind: str
    style: int
    group: str


@dataclass(frozen=True)
class Ramp:
    """A color bar, and the indices of the views that use it."""

    label: str
    colors: list[str]
    limits: Limits
    log: bool
    views: list[int]


@dataclass(frozen=True)
class Plan:
    """A figure ready to be drawn; ``heats`` maps the index of a view to its color bar in ``ramps``."""

    views: list[View]
    rows: list[list[int]]
    frames: list[Any]
    frame_label: str
    entries: list[Entry]
    legend_title: str
    ramps: list[Ramp]
    heats: dict[int, int]
    title: str
    caption: str
    theme: Theme


def plan(drawable: Drawable, theme: Theme) -> Plan:
    """Compute everything that does not depend on the renderer."""
    charts = [chart for row in drawable.rows() for chart in row]
    shared = color_columns(charts), style_columns(charts), theme
    panels = [Panel(chart, scale(chart, "x"), scale(chart, "y"), *shared) for chart in charts]
    frames, frame_label = _frames(charts)
    numbers = iter(range(len(charts)))
    heats, ramps = _heats(charts)
    entries = _merge_entries([entry for panel in panels for entry in _entries(panel)])
    titles = {chart.color_label for chart in charts}
    return Plan(
        views=[View(panel, *ends) for panel, ends in zip(panels, ranges(panels, frames), strict=True)],
        rows=[[next(numbers) for _ in row] for row in drawable.rows()],
        frames=frames,
        frame_label=frame_label,
        entries=entries if len(entries) > 1 else [],
        legend_title=titles.pop() if len(titles) == 1 else "",
        ramps=ramps + _column_ramps(panels),
        heats=heats,
        title=charts[0].title if len(charts) == 1 else "",
        caption=_join_captions(charts),
        theme=theme,
    )


def _frames(charts: Sequence[Chart]) -> tuple[list[Any], str]:
    """Return the frames of all panels, and the name of their column."""
    columns = [chart.data[chart.frame] for chart in charts if chart.frame is not None]
    labels = list(dict.fromkeys(str(column.name) for column in columns))
    if len(labels) > 1:
        raise ValueError(f"panels must have the same frame column, got {', '.join(labels)}")
    return list(categories(columns)), "".join(labels)


def _join_captions(charts: Sequence[Chart]) -> str:
    """Return the captions of all panels: once if they are equal, else prefixed by the panel titles."""
    if len({chart.caption for chart in charts if chart.caption}) < 2:
        return next((chart.caption for chart in charts if chart.caption), "")
    return "\n".join(f"{chart.title}: {chart.caption}".removeprefix(": ") for chart in charts if chart.caption)


def _entries(panel: Panel) -> Iterator[Entry]:
    """Yield the legend entries of a panel: colors that no axis or color bar shows, then styles."""
    for column, marks in _encoded_columns(panel.chart, "color"):
        colors = panel.colors[column]
        if colors.limits is not None or any(column in (mark.columns()["x"], mark.columns().get("y")) for mark in marks):
            continue
        for value in colors.categories:
            for mark in marks:
                if (panel.chart.table(mark)[column] == value).any():
                    kind, encoding = LOOKS.get(mark.kind, ("patch", ""))
                    styled = mark.columns().get(encoding) == column
                    style = panel.style(mark, encoding, {column: value}) if styled else 0
                    yield Entry(short_name(value), colors.of(value, panel.theme), kind, style, group({column: value}))
    for kind, encoding in LOOKS.values():
        for column, (mark, *_) in _encoded_columns(panel.chart, encoding):
            if column != mark.columns().get("color"):
                for value in panel.order(mark, column):
                    key = {column: value}
                    yield Entry(short_name(value), panel.theme.ink, kind, panel.style(mark, encoding, key), group(key))


def _merge_entries(entries: Sequence[Entry]) -> list[Entry]:
    """Merge entries with equal name, color and group; a line replaces a dot, and a dot a patch."""
    forms = [kind for kind, _ in LOOKS.values()]
    merged: dict[tuple[str, str, str], Entry] = {}
    for entry in sorted(entries, key=lambda entry: forms.index(entry.kind) if entry.kind in forms else len(forms)):
        merged.setdefault((entry.label, entry.color, entry.group), entry)
    return [merged[key] for key in dict.fromkeys((entry.label, entry.color, entry.group) for entry in entries)]


def _encoded_columns(chart: Chart, encoding: str) -> list[tuple[str, list[Mark]]]:
    """Return the columns that an encoding uses, with their marks."""
    found: dict[str, list[Mark]] = {}
    for mark in chart.marks:
        if encoding in mark.columns():
            found.setdefault(mark.columns()[encoding], []).append(mark)
    return list(found.items())


def _heats(charts: Sequence[Chart]) -> tuple[dict[int, int], list[Ramp]]:
    """Return view -> index of its color bar, and the color bars of heat maps.

    Heat maps with the same label, scale and limits share one color bar and its ends.
    """
    alike: dict[tuple[Any, ...], list[tuple[int, Chart, Heat]]] = {}
    for view, chart in enumerate(charts):
        for mark in chart.marks:
            if isinstance(mark, Heat):
                # Heat maps without a label may show different quantities, so each gets its own color bar.
                same = (mark.label,) if mark.label else (view, "")
                alike.setdefault((*same, mark.scale, mark.log, tuple(mark.limits or ())), []).append(
                    (view, chart, mark)
                )
    ramps = []
    for uses in alike.values():
        mark = uses[0][2]
        numbers = np.concatenate([to_floats(chart.table(heat)[heat.value]) for _, chart, heat in uses])
        colors = RED_BLUE if mark.scale == "diverging" else VIRIDIS
        ramps.append(Ramp(mark.label, colors, _heat_limits(mark, numbers), mark.log, [view for view, _, _ in uses]))
    return {view: number for number, ramp in enumerate(ramps) for view in ramp.views}, ramps


def _heat_limits(mark: Heat, numbers: Float[np.ndarray, "n"]) -> Limits:
    """Return the values at both ends of a color scale."""
    if mark.limits is not None:
        return float(mark.limits[0]), float(mark.limits[1])
    numbers = numbers[numbers > 0] if mark.log else numbers[np.isfinite(numbers)]
    if mark.scale == "diverging":
        # Equal distances from zero keep zero at the neutral color.
        far = float(np.abs(numbers).max(initial=0.0)) or 1.0
        return -far, far
    if not numbers.size:
        return 1.0, 10.0
    low, high = float(numbers.min()), float(numbers.max())
    return (low, high) if low < high else (low, 10 * low if mark.log else low + 1.0)


def _column_ramps(panels: Sequence[Panel]) -> list[Ramp]:
    """Return the color bars of numeric columns that color lines, dots or bars."""
    ramps = []
    for column, colors in panels[0].colors.items():
        if colors.limits is not None:
            views = [
                view for view, panel in enumerate(panels) if column in dict(_encoded_columns(panel.chart, "color"))
            ]
            ramps.append(Ramp(colors.label, panels[0].theme.ramp, colors.limits, False, views))
    return ramps
