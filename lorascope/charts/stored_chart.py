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

    def pack_chart(chart: Chart) -> dict[str, Any]:
        axes = {name: _values(axis, ticks=_pairs(axis.ticks)) for name, axis in (("x", chart.x), ("y", chart.y))}
        return _values(chart, data=number(chart.data), marks=list(map(pack_mark, chart.marks)), **axes)

    rows = [[pack_chart(chart) for chart in row] for row in drawable.rows()]
    return {"panels": isinstance(drawable, Panels), "rows": rows}, tables


def unpack(packed: Mapping[str, Any], tables: Sequence[pd.DataFrame]) -> Drawable:
    """Return the stored chart or panels from the JSON values and tables that ``pack`` returned."""

    def unpack_mark(stored: Mapping[str, Any]) -> Mark:
        settings = {name: value for name, value in stored.items() if name not in ("kind", "data")}
        table_number = stored["data"]
        return _MARKS[stored["kind"]](**settings, data=None if table_number is None else tables[table_number])

    def unpack_chart(stored: Mapping[str, Any]) -> Chart:
        axes = {
            name: Axis(**stored[name] | {"ticks": None if (pairs := stored[name]["ticks"]) is None else dict(pairs)})
            for name in ("x", "y")
        }
        marks = [unpack_mark(mark) for mark in stored["marks"]]
        return Chart(**{**stored, "data": tables[stored["data"]], "marks": marks} | axes)

    grid = tuple(tuple(unpack_chart(stored) for stored in row) for row in packed["rows"])
    return Panels(grid) if packed["panels"] else grid[0][0]


def _values(owner: Any, **replaced: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON values, with some of them replaced."""
    return {
        field.name: _json_value(getattr(owner, field.name)) for field in fields(owner) if field.name not in replaced
    } | (replaced)


def _pairs(ticks: Mapping[Any, str] | None) -> list[list[Any]] | None:
    """Return ticks as pairs, because keys of JSON are strings."""
    return None if ticks is None else [[_json_value(value), label] for value, label in ticks.items()]


def _json_value(value: Any) -> Any:
    match value:
        case np.generic():
            return value.item()
        case Mapping():
            return {key: _json_value(inner) for key, inner in value.items()}
        case tuple() | list():
            return [_json_value(inner) for inner in value]
    return value
