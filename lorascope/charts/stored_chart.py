"""Charts as JSON values and tables, from which the same charts are built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd

from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.charts.marks import Axis, Band, Bar, Heat, Line, Mark, Point, Rule, Text

_MARKS: dict[str, type[Mark]] = {kind.__name__: kind for kind in (Line, Band, Point, Bar, Heat, Rule, Text)}


def pack(drawable: Drawable) -> tuple[dict[str, Any], list[pd.DataFrame]]:
    """Return a chart or panels to be stored, as JSON values and the tables to which they refer by number."""
    tables: list[pd.DataFrame] = []

    def number(table: pd.DataFrame | None) -> int | None:
        if table is None:
            return None
        tables.append(table.reset_index(drop=True))
        return len(tables) - 1

    def pack_mark(mark: Mark) -> dict[str, Any]:
        return {"kind": type(mark).__name__} | _values(mark, data=number(mark.data))

    def pack_axis(axis: Axis) -> dict[str, Any]:
        ticks: Any = axis.ticks
        if ticks is not None:
            ticks = list(ticks.items())  # pairs, because keys of JSON are strings
        return _values(axis, ticks=_json_value(ticks))

    def pack_chart(chart: Chart) -> dict[str, Any]:
        x, y = pack_axis(chart.x), pack_axis(chart.y)
        return _values(chart, data=number(chart.data), marks=list(map(pack_mark, chart.marks)), x=x, y=y)

    rows = [list(map(pack_chart, row)) for row in drawable.rows()]
    # Number of columns of panels, 1 if the rows determine it; 0 for a chart.
    columns = max(drawable.columns, 1) if isinstance(drawable, Panels) else 0
    packed = {"panels": columns, "rows": rows}
    if isinstance(drawable, Panels) and drawable.title:
        packed["title"] = drawable.title
    return packed, tables


def unpack(packed: Mapping[str, Any], tables: Sequence[pd.DataFrame]) -> Drawable:
    """Return the stored chart or panels from the JSON values and tables that ``pack`` returned."""

    def unpack_mark(stored: Mapping[str, Any]) -> Mark:
        settings = dict(stored)
        kind, table_number = _MARKS[settings.pop("kind")], settings.pop("data")
        if table_number is not None:
            settings["data"] = tables[table_number]
        return kind(**settings)

    def unpack_axis(stored: Mapping[str, Any]) -> Axis:
        settings = dict(stored)
        if settings["ticks"] is not None:
            settings["ticks"] = dict(settings["ticks"])
        return Axis(**settings)

    def unpack_chart(stored: Mapping[str, Any]) -> Chart:
        x, y = unpack_axis(stored["x"]), unpack_axis(stored["y"])
        marks = list(map(unpack_mark, stored["marks"]))
        return Chart(**{**stored, "data": tables[stored["data"]], "marks": marks, "x": x, "y": y})

    grid = tuple(tuple(map(unpack_chart, row)) for row in packed["rows"])
    if packed["panels"]:
        return Panels(grid, packed["panels"], packed.get("title", ""))
    return grid[0][0]


def _values(owner: Any, **replaced: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON values, with some of them replaced."""
    values = {}
    for field in fields(owner):
        if field.name not in replaced:
            values[field.name] = _json_value(getattr(owner, field.name))
    return values | replaced


def _json_value(value: Any) -> Any:
    match value:
        case np.generic():
            return value.item()
        case Mapping():
            return {key: _json_value(inner) for key, inner in value.items()}
        case tuple() | list():
            return list(map(_json_value, value))
    return value
