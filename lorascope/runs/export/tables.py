"""A run's tables as files: CSV, Parquet or JSON, by the ending of the name."""

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
from lorascope.runs.run import Run


def to_table(run: Run, out: str | Path, summary: bool = False, state: str = "last") -> Path:
    """Write a run's long table of records, or the one with a row a module.

    Parquet keeps all dtypes. CSV and JSON keep every digit; in CSV a missing value and an empty name are both an empty
    cell, in JSON what is missing is null and infinity the text "Infinity", for which JSON has no number. For
    text in CSV see `safe_csv.csv_text`.

    Parameters
    ----------
    run : Run
        Trained here, or an adapter that was read.
    out : path
        A new file that ends in .csv, .parquet or .json.
    summary : bool
        ``run.summary`` in place of ``run.table``.
    state : {"last", "best"}
        Of the summary; the long table holds all steps.

    Returns
    -------
    path
        The file.

    Raises
    ------
    FileExistsError
        The file is there already.
    ValueError
        Another ending.
    """
    path = Path(out)
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path} has no ending of a table: give a name in {', '.join(_WRITERS)}")
    if path.exists():
        raise FileExistsError(f"{path} exists: give a new file")
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
