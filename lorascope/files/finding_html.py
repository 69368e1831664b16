"""HTML of a result in a notebook: the finding in one line, its table, and the command that comes next."""

from __future__ import annotations

from typing import Any

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable


def finding_html(finding: str, table: pd.DataFrame, next_command: str = "") -> str:
    """Return a finding with its table as HTML; names from files are escaped.

    Parameters
    ----------
    finding : str
        What the table shows, in one line.
    table : DataFrame
        Its columns of text are made printable.
    next_command : str
        Command of a shell; "" for none.
    """
    from html import escape  # slow import

    lines = [
        f"<p>{escape(printable(finding))}</p>",
        table.map(_printable_cell).to_html(index=False, na_rep=""),
    ]
    if next_command:
        lines.append(f"<p>next: <code>{escape(printable(next_command))}</code></p>")
    return "\n".join(lines)


def _printable_cell(value: Any) -> Any:
    # Numbers stay, because the table formats a whole column.
    if isinstance(value, str):
        return printable(value)
    return value
