"""Reader of untrusted Parquet tables with size limits.

A Parquet file of a few kilobytes can declare any number of rows and repeat one long text in each. The declared sizes
are checked against limits before the data is read.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lorascope.extras import requirement
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.files.typed_json import require_small

MAX_FILE = 2**30
MAX_ROWS = 2**25
"""Enough for the importance of 100,000 components at 300 steps: 30 million rows, 2 GB in memory."""
MAX_COLUMNS = 200
MAX_TEXT = 128
"""Maximum bytes of a text column per row of ``max_rows``, if every row were as long as its longest text."""


def read_table(file: Path | Any, name: object, max_rows: int = MAX_ROWS) -> pd.DataFrame:
    """Read a Parquet table of at most ``max_rows`` from a path or file object; errors call it ``name``.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ModuleNotFoundError
        pyarrow is not installed.
    ValueError
        The file is not a Parquet table, has nested columns or exceeds a limit.
    """
    if isinstance(file, Path):
        require_table_file(file)
    try:
        # pyarrow cannot open every valid file name.
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream:
            return _decode_table(stream, max_rows).to_pandas()
    except ModuleNotFoundError as error:
        # Tables are read on access, so a user of Python sees this error, not only the command line.
        raise ModuleNotFoundError(f"a Parquet table {requirement(error)}", name=error.name) from None
    except Exception as error:  # broken files raise KeyError, TypeError, ArrowException and others
        reason = " ".join(printable(error).split())[:300]
        raise ValueError(f"cannot read {printable(name)} as a Parquet table: {reason}") from error


def require_table_file(file: Path) -> None:
    """Raise a ValueError unless a file is regular and small enough for a table, in Parquet or another format."""
    require_small(file, MAX_FILE)


def require_declared_size(file: Any, max_rows: int = MAX_ROWS) -> Any:
    """Return the schema of an open Parquet file; raise a ValueError if its metadata declare too large a table."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        rows = size = 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            rows, size = rows + group.num_rows, size + group.total_byte_size
        rows = max(rows, metadata.num_rows)  # either may be forged
        if rows > max_rows or len(schema) > MAX_COLUMNS or size > 4 * MAX_FILE:
            raise ValueError(
                f"it must have <= {max_rows} rows, {MAX_COLUMNS} columns and {4 * MAX_FILE} bytes, "
                f"got {rows} rows, {len(schema)} columns and {size} bytes"
            )
    file.seek(0)
    return schema


def _decode_table(file: Any, max_rows: int) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = require_declared_size(file, max_rows)
    texts = {}
    for field in schema:
        if pa.types.is_nested(field.type):
            raise ValueError(f"column {field.name!r} must not be nested, got {field.type}")
        if _is_text(field.type):
            texts[field.name] = field.type
    # A dictionary stores a text that is repeated in every row only once.
    with pq.ParquetFile(file, read_dictionary=list(texts)) as parquet:
        table = parquet.read(use_threads=False)
    for number, name in enumerate(table.column_names):
        column = table.column(number)
        if not pa.types.is_dictionary(column.type):
            continue
        size = 0
        for chunk in column.chunks:
            lengths = (len(text) for text in chunk.dictionary.to_pylist() if isinstance(text, str | bytes))
            size += len(chunk) * max(lengths, default=0)
        if size > MAX_TEXT * max_rows:
            raise ValueError(f"column {name!r} must have <= {MAX_TEXT * max_rows} bytes of text, got {size}")
        if name in texts:
            table = table.set_column(number, name, column.cast(texts[name]))
    return table.replace_schema_metadata(schema.metadata)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind)
