"""CSV tables of the evidence: kinds of columns, strict reading, writing, and comparison."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.files.printable import count_phrase, printable
from lorascope.files.typed_json import MAX_BYTES, require_small, unreadable

CLOSE = 1e-9  # relative rounding of another machine or another version of NumPy


@dataclass(frozen=True)
class ColumnKind:
    """Values of a column of a CSV file of the evidence: their description in errors, dtype, and conversion from text.

    The conversion raises a KeyError or ValueError for other texts.
    """

    name: str
    dtype: str
    convert: Callable[[str], Any]


def _to_count(text: str) -> int:
    if not 0 <= int(text) < 2**32:
        raise ValueError("must be from 0 to 4294967295")
    return int(text)


TEXT = ColumnKind("text", "str", str)
COUNT = ColumnKind("an integer from 0 to 4294967295", "int64", _to_count)
# pandas writes NaN as an empty field.
NUMBER = ColumnKind("a number or empty", "float64", lambda text: float(text or "nan"))
_ROLES = {"tuning": "tuning", "judged": "judged"}
ROLE = ColumnKind("tuning or judged", "str", _ROLES.__getitem__)


def read_csv(file: Path, columns: Mapping[str, ColumnKind]) -> pd.DataFrame:
    """Read a CSV file of the evidence with exactly these columns.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The last row is incomplete, the columns are others, or a value is not of the kind of its column.
    """
    require_small(file, MAX_BYTES)
    try:
        return parse_csv(file.read_bytes(), columns)
    except ValueError as error:
        raise unreadable(file, printable(error)) from error


def parse_csv(content: bytes, columns: Mapping[str, ColumnKind]) -> pd.DataFrame:
    """Parse the content of a CSV file with exactly these columns; see ``read_csv``."""
    if not content.endswith(b"\n"):  # a file that was cut off ends within a row
        raise ValueError("its last row is incomplete")
    table = text_table(content)
    if list(table.columns) != list(columns):
        different = sorted(set(table.columns) ^ set(columns)) or ["another order"]
        raise ValueError(f"its columns differ: {', '.join(different)}")
    return pd.DataFrame({name: _convert(table[name], kind) for name, kind in columns.items()})


def text_table(content: bytes) -> pd.DataFrame:
    """Return the content of a CSV file as a table of texts.

    Raises
    ------
    ValueError
        The file is not UTF-8, is empty, or a row has more or fewer fields than the header.
    """
    try:
        # pandas would guess types, and fill rows that are too short.
        header, *rows = list(csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)) or [[]]
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if not header:
        raise ValueError("it has no columns")
    for number, row in enumerate(rows, start=2):  # row 1 is the header
        if len(row) != len(header):
            raise ValueError(f"row {number} must have {count_phrase(len(header), 'field')}, got {len(row)}")
    return pd.DataFrame(rows, columns=header, dtype="object")


def _convert(column: pd.Series, kind: ColumnKind) -> pd.Series:
    """Convert texts to a kind of values."""
    values = []
    for number, text in enumerate(column, start=2):
        try:
            values.append(kind.convert(text))
        except (KeyError, ValueError) as error:
            raise ValueError(f"row {number}: {column.name} must be {kind.name}, got {text!r}") from error
    return pd.Series(values, index=column.index, dtype=kind.dtype)


def to_csv(table: pd.DataFrame) -> bytes:
    """Return a table as the content of a CSV file, with the same line ends on every system."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def compare_with_file(file: Path, content: bytes) -> Iterator[str]:
    """Compare a kept table with its recomputed content, and return one line for each difference."""
    if not file.exists():
        yield f"{file.name}: no such file"
        return
    try:
        table = text_table(file.read_bytes())
    except ValueError as error:
        yield f"{file.name}: {printable(error)}"
        return
    yield from compare_tables(file.name, table, text_table(content))


def compare_tables(name: str, old: pd.DataFrame, new: pd.DataFrame) -> Iterator[str]:
    """Compare two tables of texts cell by cell for the verification, and return one line for each difference."""
    if list(old.columns) != list(new.columns) or len(old) != len(new):
        yield f"{name}: kept {_shape(old)}, recomputed {_shape(new)}"
        return
    for number, column in zip(*np.nonzero((old != new).to_numpy()), strict=True):
        cells = str(old.iat[number, column]), str(new.iat[number, column])
        if not _are_equal(*cells):
            # Row 1 is the header. The first two columns say what the row is about.
            row = f"row {number + 2} ({' '.join(map(str, old.iloc[number, :2]))})"
            yield f"{name}: {row}: {old.columns[column]}: kept {cells[0]!r}, recomputed {cells[1]!r}"


def _shape(table: pd.DataFrame) -> str:
    rows, columns = table.shape
    return f"{count_phrase(rows, 'row')} and {count_phrase(columns, 'column')}"


def _are_equal(old: str, new: str) -> bool:
    """Compare two cells; numbers may differ by the rounding of another machine."""
    try:
        return bool(np.isclose(float(old), float(new), rtol=CLOSE, atol=1e-12))  # the second one is for zeros
    except ValueError:
        return False
