"""Charts of the page: data stored once, with the changes for dark and narrow screens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

from lorascope.charts import plotly_backend
from lorascope.charts.chart import Drawable
from lorascope.charts.figure_plan import plan
from lorascope.charts.theme import theme

NARROW = 358.0  # pixels: width of a chart on a phone


@dataclass(frozen=True)
class EmbeddedChart:
    """Chart in the form that the script of the page draws.

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
    """Draw a chart for every kind of screen; panels are stacked vertically on narrow screens."""
    settled = plan(drawable, theme("light"))
    # The page prints title and caption.
    light, dark = (replace(one, title="", caption="") for one in (settled, plan(drawable, theme("dark"))))
    figure, recolored = _slim(_figure_json(plotly_backend.draw(light))), _slim(_figure_json(plotly_backend.draw(dark)))
    # Traces do not depend on the width of the screen, so a narrow screen changes only the layout.
    stacked = (replace(one, rows=[[view] for view in range(len(one.panels))]) for one in (light, dark))
    narrow, narrow_dark = (_figure_json(plotly_backend.ground(one, NARROW))["layout"] for one in stacked)
    variants = {
        "dark": recolored,
        "narrow": figure | {"layout": narrow},
        "narrow dark": recolored | {"layout": narrow_dark},
    }
    return EmbeddedChart(
        title=title(drawable),
        caption=settled.caption,
        figure=figure,
        changes={name: list(changes(figure, variant)) for name, variant in variants.items()},
        heights={"wide": figure["layout"]["height"], "narrow": narrow["height"]},
    )


def title(drawable: Drawable) -> str:
    """Return the title of a chart, or the name of its figure if there are several panels or no title."""
    charts = [chart for row in drawable.rows() for chart in row]
    if len(charts) == 1 and charts[0].title:
        return charts[0].title
    return str(charts[0].meta.get("figure", "")).replace("_", " ").capitalize()


def changes(old: Any, new: Any, *path: str | int) -> Iterator[list[Any]]:
    """Yield the path and the new value of each difference between two JSON values; None means that a key is absent."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from changes(old.get(key), new.get(key), *path, key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from changes(before, after, *path, place)
    elif old != new:
        yield [list(path), new]


def _figure_json(figure: go.Figure) -> dict[str, Any]:
    return dict(json.loads(figure.to_json()))


def _slim(figure: dict[str, Any]) -> dict[str, Any]:
    """Remove data that the frames of a slider repeat; plotly keeps the keys of a trace that a frame does not set."""
    frames = figure.get("frames", [])
    for place, number in enumerate(frames[0]["traces"] if frames else ()):
        trace, moving = figure["data"][number], [frame["data"][place] for frame in frames]
        for key in trace.keys() - {"type"}:
            if all(key in other and other[key] == trace[key] for other in moving):
                for other in moving:
                    del other[key]
    return figure
