"""Charts inside a page: the numbers once, and what changes on a dark screen and on a narrow one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

from lorascope.charts import plotly_backend
from lorascope.charts.chart import Drawable
from lorascope.charts.figure_plan import Plan, plan
from lorascope.charts.theme import theme

NARROW = 358.0  # pixels that a telephone leaves for a chart


@dataclass(frozen=True)
class EmbeddedChart:
    """A chart as the page's script draws it, with title and caption left to the page.

    Parameters
    ----------
    title, caption : str
    figure : dict
        Plotly's ``data``, ``layout`` and ``frames`` for a wide and light screen.
    changes : dict
        For a ``"dark"``, a ``"narrow"`` and a ``"narrow dark"`` screen: pairs of a path into ``figure`` and the value
        to set there.
    heights : dict
        Pixels on a ``"wide"`` and on a ``"narrow"`` screen.
    """

    title: str
    caption: str
    figure: dict[str, Any]
    changes: dict[str, list[list[Any]]]
    heights: dict[str, int]


def embed(drawable: Drawable) -> EmbeddedChart:
    """Draw a chart for every screen; on a narrow one, panels stand one above the other."""
    settled = plan(drawable, theme("light"))
    light, dark = _strip_titles(settled), _strip_titles(plan(drawable, theme("dark")))
    figure, recoloured = _slim(_figure_json(plotly_backend.draw(light))), _slim(_figure_json(plotly_backend.draw(dark)))
    narrow, narrow_dark = (
        _figure_json(plotly_backend.ground(_stack_views(one), NARROW))["layout"] for one in (light, dark)
    )
    variants = {
        "dark": recoloured,
        "narrow": figure | {"layout": narrow},
        "narrow dark": recoloured | {"layout": narrow_dark},
    }
    return EmbeddedChart(
        title=title(drawable),
        caption=settled.caption,
        figure=figure,
        changes={name: list(changes(figure, variant)) for name, variant in variants.items()},
        heights={"wide": figure["layout"]["height"], "narrow": narrow["height"]},
    )


def title(drawable: Drawable) -> str:
    """A chart's own title; panels, and charts without one, go by the name of their figure."""
    charts = [chart for row in drawable.rows() for chart in row]
    if len(charts) == 1 and charts[0].title:
        return charts[0].title
    return str(charts[0].meta.get("figure", "")).replace("_", " ").capitalize()


def changes(old: Any, new: Any, *path: str | int) -> Iterator[list[Any]]:
    """What to set where in JSON to get from ``old`` to ``new``; None stands for what is not there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from changes(old.get(key), new.get(key), *path, key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from changes(before, after, *path, place)
    elif old != new:
        yield [list(path), new]


def _strip_titles(settled: Plan) -> Plan:
    return replace(settled, title="", caption="")


def _stack_views(settled: Plan) -> Plan:
    return replace(settled, rows=[[view] for view in range(len(settled.views))])


def _figure_json(figure: go.Figure) -> dict[str, Any]:
    return dict(json.loads(figure.to_json()))


def _slim(figure: dict[str, Any]) -> dict[str, Any]:
    """Without what the frames of a slider repeat: plotly keeps of a trace what a frame does not name."""
    frames = figure.get("frames", [])
    for place, number in enumerate(frames[0]["traces"] if frames else ()):
        moving = [frame["data"][place] for frame in frames]
        for key in _constant(figure["data"][number], moving):
            for trace in moving:
                del trace[key]
    return figure


def _constant(trace: dict[str, Any], moving: Sequence[dict[str, Any]]) -> list[str]:
    """The keys, but for the type, whose values no frame changes."""
    return [
        key for key in trace if key != "type" and all(key in other and other[key] == trace[key] for other in moving)
    ]
