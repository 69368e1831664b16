"""Export of a run's tables as CSV, Parquet or JSON files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.files.safe_csv import csv_text
from lorascope.files.safetensors_io import write_bytes
from lorascope.runs.result import Result


def to_table(run: Result, out: str | Path, summary: bool = False, state: str = "last") -> Path:
    """Write a run's table of all records, or its summary with one row per module.

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
        raise ValueError(f"ending must be one of {', '.join(_WRITERS)}, got {path}")
    if path.exists():
        raise FileExistsError(f"cannot create {path}: it exists, pass a new file")
    write_bytes(path, _WRITERS[path.suffix](run.summary(state=state) if summary else run.table))
    return path


def _encode_csv(table: pd.DataFrame) -> bytes:
    return csv_text(table).encode()


def _encode_parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _encode_json(table: pd.DataFrame) -> bytes:
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    plain = [{name: _name_infinity(value) for name, value in row.items()} for row in rows]
    return ("[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in plain) + "\n]\n").encode()


def _name_infinity(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


_WRITERS: dict[str, Callable[[pd.DataFrame], bytes]] = {
    ".csv": _encode_csv,
    ".parquet": _encode_parquet,
    ".json": _encode_json,
}
