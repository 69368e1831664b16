"""JSON files that other programs wrote, read under a typed schema.

A file from elsewhere may be a pipe, nested without end, or hold a list where a number belongs. Every such file is read
here: it must be a regular file of limited size, and its values must have the types of a dataclass.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lorascope.printable import printable

T = TypeVar("T")

# A run.json of a model with 100,000 modules takes 20 MB.
MAX_BYTES = 100 * 2**20


def require_regular(path: Path) -> int:
    """Return the size of a regular file in bytes; opening a pipe or a device may wait forever.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is a folder, a pipe, a socket or a device.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"cannot read {printable(path)}: not a regular file")
    return found.st_size


def parse_json(text: str | bytes, name: object) -> Any:
    """Parse JSON; a ValueError names its source ``name``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise ValueError(f"cannot read {printable(name)} as JSON: {reason}") from error


def typed(content: Any, schema: type[T], name: object) -> T:
    """Convert parsed JSON to a dataclass or another type that `msgspec` knows, without coercion.

    Unknown fields are ignored.

    Raises
    ------
    ValueError
        A value has another type than the schema; the message names its place and ``name``.
    """
    try:
        return msgspec.convert(content, schema)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"cannot read {printable(name)}: {printable(error)}") from error


def read_json(path: Path, schema: type[T]) -> T:
    """Read a JSON file as an instance of ``schema``.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is not a regular file, larger than 100 MiB, not JSON in UTF-8, or does not fit the schema.
    """
    size = require_regular(path)
    if size > MAX_BYTES:
        raise ValueError(f"cannot read {printable(path)}: {size} bytes, at most {MAX_BYTES} are read")
    return typed(parse_json(path.read_bytes(), path), schema, path)
