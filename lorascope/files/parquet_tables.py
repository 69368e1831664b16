"""Tables in Parquet files that other people wrote, read within limits.

A Parquet file of a few kilobytes may declare any number of rows, and repeat one long text in each. What a file declares
is compared with limits before it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.files.printable import printable
from lorascope.files.typed_json import require_regular

MAX_FILE = 2**30
MAX_ROWS = 2**25
"""The importance of 100,000 components at 300 steps has 30 million rows: 2 GB in memory."""
MAX_COLUMNS = 200
MAX_TEXT = 2**32
"""Bytes of a column of text, each row counted with the longest text."""


def read_table(file: Path | Any, name: object) -> pd.DataFrame:
    """Read a table.

    Parameters
    ----------
    file : path or file object
    name : object
        What it is called in errors.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is not a Parquet file, nested, or larger than the limits.
    """
    if isinstance(file, Path) and (size := require_regular(file)) > MAX_FILE:
        raise ValueError(f"cannot read {printable(name)}: {size} bytes, at most {MAX_FILE} are read")
    try:
        if isinstance(file, Path):
            with file.open("rb") as stream:  # pyarrow cannot open every name
                return _decode_table(stream).to_pandas()
        return _decode_table(file).to_pandas()
    except Exception as error:  # broken files raise KeyError, TypeError, ArrowException and others
        reason = " ".join(printable(error).split())[:300]
        raise ValueError(f"cannot read {printable(name)} as a Parquet table: {reason}") from error


def _decode_table(file: Any) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
        size = sum(group.total_byte_size for group in groups)
        if rows > MAX_ROWS or len(schema) > MAX_COLUMNS or size > 4 * MAX_FILE:
            raise ValueError(
                f"{rows} rows, {len(schema)} columns and {size} bytes; at most {MAX_ROWS} rows, {MAX_COLUMNS} columns "
                f"and {4 * MAX_FILE} bytes are read"
            )
    nested = next((field for field in schema if pa.types.is_nested(field.type)), None)
    if nested is not None:
        raise ValueError(f"column {nested.name!r} must hold plain values, got {nested.type}")
    texts = {field.name: field.type for field in schema if _is_text(field.type)}
    file.seek(0)
    # A text that is repeated in every row is read once.
    with pq.ParquetFile(file, read_dictionary=list(texts)) as parquet:
        table = parquet.read(use_threads=False)
    for number, name in enumerate(table.column_names):
        column = table.column(number)
        if not pa.types.is_dictionary(column.type):
            continue
        if sum(len(part) * _longest(part.dictionary) for part in column.chunks) > MAX_TEXT:
            raise ValueError(f"column {name!r} must hold at most {MAX_TEXT} bytes of text")
        if name in texts:
            table = table.set_column(number, name, column.cast(texts[name]))
    return table.replace_schema_metadata(schema.metadata)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))


def _longest(texts: Any) -> int:
    return max((len(text) for text in texts.to_pylist() if isinstance(text, str | bytes)), default=0)
