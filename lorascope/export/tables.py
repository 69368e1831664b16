"""Export of a run's tables as CSV, Parquet or JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lorascope.files.safe_csv import csv_text
from lorascope.files.whole_files import require_absent, write_new
from lorascope.runs.result import Result


def to_table(run: Result, out: str | Path, summary: bool = False, state: str = "last") -> Path:
    """Write a run's table of all records, or its summary with one row per module, as CSV, Parquet or JSON.

    Parquet preserves all dtypes. CSV and JSON preserve every digit. In CSV, missing values and empty names are empty
    cells; see `safe_csv.csv_text` for its text. In JSON, missing values are null and infinity is the text "Infinity",
    because JSON has no number for it.

    Parameters
    ----------
    run : Run
        Run or loaded adapter.
    out : path
        New file; its ending .csv, .parquet or .json selects the format.
    summary : bool
        Write ``run.summary`` instead of ``run.table``; False by default.
    state : {"last", "best"}
        Saved state of the summary, "last" by default; the table of all records has every step.

    Returns
    -------
    path
        The file.

    Raises
    ------
    FileExistsError
        The file exists.
    ValueError
        The ending of the file is not supported.
    """
    path = Path(out)
    if path.suffix not in _WRITERS:
        endings = ", ".join(map(repr, _WRITERS))
        raise ValueError(f"ending of the table must be one of {endings}, got {path.suffix!r}: {path}")
    require_absent(path)
    table = run.summary(state=state) if summary else run.table
    write_new(path, _WRITERS[path.suffix](table))
    return path


def _encode_json(table: pd.DataFrame) -> bytes:
    # A column of floats would turn None into NaN again, which JSON does not have.
    cells = table.astype(object).where(table.notna(), None)
    rows = cells.replace({math.inf: "Infinity", -math.inf: "-Infinity"}).to_dict("records")
    return ("[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n").encode()


def _encode_parquet(table: pd.DataFrame) -> bytes:
    import pyarrow  # noqa: F401 - if it is missing, pandas would not name the extra that installs it

    return table.to_parquet(index=False)


_WRITERS: dict[str, Callable[[pd.DataFrame], bytes]] = {
    ".csv": lambda table: csv_text(table).encode(),
    ".parquet": _encode_parquet,
    ".json": _encode_json,
}
