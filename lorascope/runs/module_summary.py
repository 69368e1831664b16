"""Summary of modules: numbers of one module, a row of ``Result.summary``, and of rows of modules together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.typed_json import json_values
from lorascope.schema.module_roles import position

MEASURES = ("update_norm", "relative_update", "learned_norm", "weight_norm", "stable_rank", "effective_rank")
Row = dict[str, Any]
"""Values of one module by name."""
# Nullable, because a module outside the blocks has no layer.
_DTYPES = {"layer": "Int16", "rank": "Int64"}


@dataclass
class ModuleSummary:
    """Summary of one module: position, rank, norms, stable and effective rank; NaN or None if unknown."""

    module: str
    stack: str
    layer: int | None
    role: str
    rank: int | None
    update_norm: float = np.nan
    relative_update: float = np.nan
    learned_norm: float = np.nan
    weight_norm: float = np.nan
    stable_rank: float = np.nan
    effective_rank: float = np.nan
    exact: bool = True


def table_of(kind: type, rows: Iterable[Any]) -> pd.DataFrame:
    """Return module summaries, or other rows of one dataclass, as a table with nullable integer layers and ranks."""
    columns = {column.name: str(column.type) for column in fields(kind)}
    table = pd.DataFrame(list(map(vars, rows)), columns=list(columns))
    dtypes = {}
    # Without rows, or with None in all of them, pandas would infer other types.
    for name, annotation in columns.items():
        if name in _DTYPES:
            dtypes[name] = _DTYPES[name]
        elif annotation == "float":
            dtypes[name] = "float64"
    return table.astype(dtypes)


def group_by_role(modules: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    """Return the rows of a module summary by stack and role, in the order of the axes."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for module in modules:
        groups.setdefault((module["stack"], module["role"]), []).append(module)

    def axis_position(group: tuple[tuple[str, str], list[Row]]) -> tuple[int, ...]:
        """Return the position of a role on an axis; all of its layers count as the first one."""
        (stack, role), rows = group
        if set(column(rows, "layer")) == {None}:  # outside the blocks, such as the head
            return position(stack, None, role)
        return position(stack, 0, role)

    return sorted(groups.items(), key=axis_position)


def column(rows: Iterable[Row], name: str) -> list[Any]:
    """Return one value of each row of a module summary."""
    return [row[name] for row in rows]


def rank_range(ranks: Iterable[int | None]) -> Row:
    """Return the smallest and the largest rank in a module summary, ignoring None; None if all are None."""
    numbers = [rank for rank in ranks if rank is not None]
    return {"least_rank": min(numbers, default=None), "most_rank": max(numbers, default=None)}


def without_nan(values: Iterable[float]) -> list[float]:
    """Return the values in a module summary that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def mean_without_nan(values: Iterable[float]) -> float:
    """Return the mean of the values in a module summary that are not NaN; NaN if all are NaN."""
    numbers = without_nan(values)
    if not numbers:
        return math.nan
    return sum(numbers) / len(numbers)


def pool_norms(norms: Iterable[float]) -> float:
    """Return the joint norm in a module summary, the root of summed squares; NaN are ignored unless all are NaN."""
    numbers = without_nan(norms)
    if not numbers:
        return math.nan
    return math.hypot(*numbers)


def in_axis_order(frame: pd.DataFrame, layers: Iterable[Any]) -> pd.DataFrame:
    """Sort the rows of a module summary by stack, layer and role, in the order of the axes."""
    positions = [position(*module) for module in zip(frame["stack"], layers, frame["role"], strict=True)]
    return frame.iloc[sorted(range(len(frame)), key=positions.__getitem__)].reset_index(drop=True)


def json_rows(frame: pd.DataFrame) -> list[Row]:
    """Convert the rows of a module summary to JSON values; unknown values are None."""
    # In a column of floats, pandas would turn None back into NaN.
    return json_values(frame.astype(object).where(frame.notna(), None).to_dict("records"))
