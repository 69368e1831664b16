"""Conversion of tables to CSV that is safe for spreadsheets and terminals."""

from __future__ import annotations

from typing import Any

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable

# Spreadsheets evaluate a cell that starts with one of these as a formula; full-width ones in East Asian locales.
_FORMULAS = tuple("=+-@＝＋－＠")


def csv_text(table: pd.DataFrame) -> str:
    r"""Convert a table to CSV that is safe to open in spreadsheets, without its index.

    In text cells and column names, control characters are escaped as in Python's string literals, such as ``\n``, and
    text that a spreadsheet would evaluate as a formula gets a leading apostrophe. Numbers are unchanged. Lines end in a
    line feed.
    """
    escaped = table.rename(columns=_escape_cell)
    for position, kind in enumerate(table.dtypes):
        if not (pd.api.types.is_numeric_dtype(kind) or pd.api.types.is_bool_dtype(kind)):
            escaped.isetitem(position, table.iloc[:, position].map(_escape_cell, na_action="ignore").to_numpy())
    return escaped.to_csv(index=False, lineterminator="\n")


def _escape_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULAS) and not is_numeric_text(text) else text


def is_numeric_text(text: str) -> bool:
    """Return whether the text of a CSV cell is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
