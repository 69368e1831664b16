"""HTML of a measured result in a notebook: the lines that a terminal shows, above its table."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from lorascope.files.printable import printable_lines

if TYPE_CHECKING:
    import pandas as pd


def lines_above_table(lines: str, table: pd.DataFrame) -> str:
    """Return escaped lines in a fixed-width font, and below them a table.

    Parameters
    ----------
    lines : str
        Text with line breaks, such as the ``repr`` of the result. Other control characters become escapes.
    table : DataFrame
        Table, without its index; missing numbers are empty.
    """
    escaped = html.escape(printable_lines(lines))
    # Jupyter centers tables and wraps text, which would break the alignment of the lines.
    return f"<pre style='text-align:left'>{escaped}</pre>\n{table.to_html(index=False, na_rep='')}"
