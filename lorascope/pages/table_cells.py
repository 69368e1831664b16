"""Cells of a page's tables as text."""

from __future__ import annotations

from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_float, is_numeric_dtype, is_scalar

LONG = 20  # rows; a longer table scrolls inside its box


def frame_cells(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Return the table cells of a DataFrame: columns, each numeric or not, and rows; a named index is a column."""
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    # pandas counts bool as numeric.
    numeric = [is_numeric_dtype(kind) and not is_bool_dtype(kind) for kind in frame.dtypes]
    columns = list(zip(map(str, frame.columns), numeric, strict=True))
    return {"columns": columns, "rows": list(frame.itertuples(index=False, name=None))}


def format_value(value: Any) -> str:
    """Format a table cell: four significant digits for a float, a dash for a missing value."""
    if is_scalar(value) and pd.isna(value):
        return "–"
    if is_float(value):
        return f"{value:.4g}"
    return str(value)
