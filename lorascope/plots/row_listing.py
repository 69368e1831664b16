"""Rows of an explorer as the text of a table on a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from lorascope.files.printable import count_phrase, printable

_COLUMNS = ("run", "step", "layer", "role", "index", "module")  # shown only if not empty
MOST_LISTED = 500  # number of rows that a browser lists without a noticeable delay


def list_rows(rows: pd.DataFrame, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the rows as text without empty columns, the long ones last; several runs appear by name."""
    texts = rows.head(MOST_LISTED).astype(dict.fromkeys(_COLUMNS, "str")).fillna(dict.fromkeys(_COLUMNS, ""))
    texts["run"] = texts["run"].map(names)
    if len(names) == 1:
        texts["run"] = ""
    cells = texts[list(_COLUMNS)].map(printable)
    cells["value"] = texts["value"].map("{:.6g}".format).replace("nan", "unknown")
    filled = [name for name in _COLUMNS if cells[name].any()]
    filled.insert(len(filled) - ("module" in filled), "value")  # names of modules are long
    count = count_phrase(len(rows), "row")
    if len(rows) > MOST_LISTED:
        count = f"First {MOST_LISTED} of {count}"
    return {
        "columns": filled,
        "cells": cells[filled].to_numpy().tolist(),
        "labels": texts.index.tolist(),
        "count": count,
    }
