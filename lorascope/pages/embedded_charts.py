"""Charts of the page: data stored once, with the changes for dark and narrow screens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

from lorascope.charts import plotly_backend
from lorascope.charts.chart import Drawable, Panels
from lorascope.charts.figure_plan import FigurePlan, plan_figure
from lorascope.charts.math_text import math_to_unicode
from lorascope.charts.theme import theme


@dataclass(frozen=True)
class EmbeddedChart:
    """Chart embedded in a page, in the form that the script of the page draws.

    Parameters
    ----------
    title, caption : str
        Printed by the page, not by the chart.
    figure : dict
        Plotly's ``data``, ``layout`` and ``frames`` for a wide, light screen.
    changes : dict
        For a ``"dark"``, ``"narrow"`` and ``"narrow dark"`` screen: pairs of a path into ``figure`` and the value to
        set at this path.
    heights : dict
        Height in pixels on a ``"wide"`` and on a ``"narrow"`` screen.
    """

    title: str
    caption: str
    figure: dict[str, Any]
    changes: dict[str, list[list[Any]]]
    heights: dict[str, int]


def embed(drawable: Drawable) -> EmbeddedChart:
    """Embed a chart in a page for every kind of screen; panels are stacked vertically on narrow screens."""
    light, dark = plan_figure(drawable, theme("light")), plan_figure(drawable, theme("dark"))
    figure, narrow = _draw_wide_and_narrow(light)
    recolored, narrow_dark = _draw_wide_and_narrow(dark)
    variants = {
        "dark": recolored,
        "narrow": figure | {"layout": narrow},
        "narrow dark": recolored | {"layout": narrow_dark},
    }
    return EmbeddedChart(
        title=title(drawable),
        caption=light.caption,
        figure=figure,
        changes={name: list(changes(figure, variant)) for name, variant in variants.items()},
        heights={"wide": figure["layout"]["height"], "narrow": narrow["height"]},
    )


def _draw_wide_and_narrow(settled: FigurePlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figure for a wide screen, and its layout for a narrow one."""
    bare = replace(settled, title="", caption="")  # the page prints them
    # Traces do not depend on the width of the screen, so a narrow screen changes only the layout.
    return _slim(_figure_json(plotly_backend.draw(bare))), plotly_backend.narrow_layout(bare)


def title(drawable: Drawable) -> str:
    """Return the title of an embedded chart, or the name of its figure if it has none."""
    first = drawable.panels[0]
    text = drawable.title if isinstance(drawable, Panels) else first.title
    return math_to_unicode(text) or str(first.meta.get("figure", "")).replace("_", " ").capitalize()


def changes(old: Any, new: Any, *path: str | int) -> Iterator[list[Any]]:
    """Yield path and new value of each difference between two embedded charts as JSON; None means an absent key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:  # in this order, so that equal cards give equal pages
            yield from changes(old.get(key), new.get(key), *path, key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from changes(before, after, *path, position)
    elif old != new:
        yield [list(path), new]


def _figure_json(figure: go.Figure) -> dict[str, Any]:
    return dict(json.loads(figure.to_json()))


def _slim(figure: dict[str, Any]) -> dict[str, Any]:
    """Remove data that the frames of a slider repeat; plotly keeps the keys of a trace that a frame does not set."""
    frames = figure.get("frames")
    if not frames:
        return figure
    for position, number in enumerate(frames[0]["traces"]):
        trace, moving = figure["data"][number], [frame["data"][position] for frame in frames]
        for key in trace.keys() - {"type"}:  # plotly needs the type in each frame
            if all(key in repeated and repeated[key] == trace[key] for repeated in moving):
                for repeated in moving:
                    del repeated[key]
    return figure
