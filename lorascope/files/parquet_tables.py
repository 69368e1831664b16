"""Reader of untrusted Parquet tables with size limits.

A Parquet file of a few kilobytes can declare any number of rows and repeat one long text in each. The declared sizes
are checked against limits before the data is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.files.printable import printable
from lorascope.files.typed_json import require_regular

MAX_FILE = 2**30
MAX_ROWS = 2**25
"""Enough for the importance of 100,000 components at 300 steps: 30 million rows, 2 GB in memory."""
MAX_COLUMNS = 200
MAX_TEXT = 2**32
"""Maximum bytes of a text column, if every row were as long as its longest text."""


def read_table(file: Path | Any, name: object) -> pd.DataFrame:
    """Read a Parquet table, after checking its size.

    Parameters
    ----------
    file : path or file object
    name : object
        Name of the table in errors.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The file is not a Parquet table, has nested columns or exceeds a limit.
    """
    if isinstance(file, Path) and (size := require_regular(file)) > MAX_FILE:
        raise ValueError(f"cannot read {printable(name)}: file size must be <= {MAX_FILE} bytes, got {size}")
    try:
        if isinstance(file, Path):
            with file.open("rb") as stream:  # pyarrow cannot open every valid file name
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
                f"it must have <= {MAX_ROWS} rows, {MAX_COLUMNS} columns and {4 * MAX_FILE} bytes, "
                f"got {rows} rows, {len(schema)} columns and {size} bytes"
            )
    nested = next((field for field in schema if pa.types.is_nested(field.type)), None)
    if nested is not None:
        raise ValueError(f"column {nested.name!r} must not be nested, got {nested.type}")
    texts = {field.name: field.type for field in schema if _is_text(field.type)}
    file.seek(0)
    # A dictionary stores a text that is repeated in every row only once.
    with pq.ParquetFile(file, read_dictionary=list(texts)) as parquet:
        table = parquet.read(use_threads=False)
    for number, name in enumerate(table.column_names):
        column = table.column(number)
        if not pa.types.is_dictionary(column.type):
            continue
        if (size := sum(len(part) * _longest(part.dictionary) for part in column.chunks)) > MAX_TEXT:
            raise ValueError(f"column {name!r} must have <= {MAX_TEXT} bytes of text, got {size}")
        if name in texts:
            table = table.set_column(number, name, column.cast(texts[name]))
    return table.replace_schema_metadata(schema.metadata)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))


def _longest(texts: Any) -> int:
    return max((len(text) for text in texts.to_pylist() if isinstance(text, str | bytes)), default=0)
