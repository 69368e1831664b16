"""Tables as text, as wide as the terminal."""

from __future__ import annotations

import shutil

import pandas as pd

from lorascope.diagnosis.terminal import elide
from lorascope.files.printable import printable

_WIDTH, _LAST = 120, 12
"""Width without a terminal, and the smallest width of the last column."""


def format_table(table: pd.DataFrame) -> str:
    """Format a table as text. Numbers are aligned to the right, and the last column is shortened to the terminal."""
    if table.empty:
        return ""
    columns = shutil.get_terminal_size((_WIDTH, 24)).columns
    right = [pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]
    rows = [list(map(str, table.columns))]
    rows += [[printable(_format(value)) for value in row] for row in table.itertuples(index=False)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = sum(widths[:-1]) + 2 * len(widths[:-1])
    widths[-1] = min(widths[-1], max(columns - 1 - left, _LAST))
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else elide(cell, width).ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    )


def _format(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
