"""Reader of untrusted JSON files with a typed schema.

Such a file may be a pipe, be nested without end, or have a list where a number is expected. It must be a regular file
of limited size, and its values must have the types of a dataclass.
"""

from __future__ import annotations

import json
import re
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable

Finite = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
"""Float whose square is finite in float64."""
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]

# A schema of T is a Callable[..., T]: dict[str, Any] is not a class.
T = TypeVar("T")

# A run.json of a model with 100,000 modules has 20 MB, a header of 200,000 tensors 25 MB. Parsed JSON takes up to 35
# times its size in memory.
MAX_BYTES = 32 * 2**20
_DEPTH = 64
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
# Only brackets outside of strings nest; all other bytes are deleted to count them.
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def unreadable(name: object, reason: str) -> ValueError:
    """Return the error for a JSON or other file, or a part of it, ``name``, that cannot be read."""
    return ValueError(f"cannot read {printable(name)}: {reason}")


def require_regular(path: Path) -> int:
    """Return the size of a regular file, such as JSON; raise a ValueError for others: a pipe could block forever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise unreadable(path, "not a regular file")
    return status.st_size


def require_small(file: Path, limit: int) -> None:
    """Raise a ValueError unless a file, such as JSON, is regular and has at most ``limit`` bytes."""
    if (size := require_regular(file)) > limit:
        raise unreadable(file, f"file size must be <= {limit} bytes, got {size}")


def read_text(path: Path) -> str:
    """Read a text file, such as JSON or TOML; a ValueError names one that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise unreadable(path, printable(error)) from error


def parse_json(text: str | bytes, name: object) -> Any:
    """Parse JSON of at most 64 nesting levels and distinct keys; a ValueError names its source ``name``."""
    raw = text.encode() if isinstance(text, str) else text
    try:
        brackets = np.frombuffer(_STRING.sub(b"", raw).translate(None, _NOT_BRACKETS), np.uint8)
        steps = np.where((brackets == ord("[")) | (brackets == ord("{")), np.int32(1), np.int32(-1))
        if steps.cumsum(dtype=np.int32).max(initial=0) > _DEPTH:
            # Deep nesting causes a RecursionError in this or any later traversal.
            raise ValueError(f"nested deeper than {_DEPTH} levels")
        content = json.loads(raw, object_pairs_hook=_distinct)
        # Tables cannot store lone surrogates. Those that stand for bytes of non-UTF-8 file names are accepted.
        if b"\\ud" in raw.lower():
            json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except ValueError as error:
        raise ValueError(f"cannot read {printable(name)} as JSON: {printable(error)}") from error
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, in which a key may not occur twice: programs differ in the value that they use."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]} occurs twice")
    return content


def to_typed(content: Any, schema: Callable[..., T], name: object) -> T:
    """Convert parsed JSON to a dataclass or another type that `msgspec` supports, without coercion.

    Unknown fields are ignored. Raise a ValueError for a value of the wrong type, with its path and its source ``name``.
    """
    try:
        return msgspec.convert(content, schema)
    except msgspec.ValidationError as error:
        raise unreadable(name, f"{printable(error)}{_value_at(content, str(error))}") from error


def _value_at(content: Any, message: str) -> str:
    """Return ``: VALUE`` for the path in a `msgspec` message, or "" if it has no path to a single value."""
    path = message.rpartition("`$")[2].rstrip("`")
    for key, index in _STEP.findall(path):
        try:
            content = content[key] if key else content[int(index)]
        except (IndexError, KeyError, TypeError):
            return ""
    if not path or "[...]" in path or isinstance(content, dict | list):
        return ""
    return f": {printable(repr(content)[:60])}"


def read_json(path: Path, schema: Callable[..., T]) -> T:
    """Read a JSON file as an instance of the type ``schema``.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The file is not regular, is larger than 32 MiB, is not JSON in UTF-8, or does not fit the schema.
    """
    require_size(require_regular(path), path)
    return to_typed(parse_json(path.read_bytes(), path), schema, path)


def require_size(size: int, name: object) -> None:
    """Raise a ValueError if JSON or TOML is too large to parse."""
    if size > MAX_BYTES:
        raise unreadable(name, f"size must be <= {MAX_BYTES} bytes, got {size}")


def json_values(value: Any) -> Any:
    """Replace NaN and infinity by None in a JSON value, because JSON has neither."""
    match value:
        case float():
            return value if np.isfinite(value) else None
        case dict():
            return {key: json_values(inner) for key, inner in value.items()}
        case list():
            return [json_values(inner) for inner in value]
    return value


def to_json_rows(table: pd.DataFrame) -> Any:
    """Return the rows of a table as JSON values; numbers that do not exist are None."""
    return json.loads(table.to_json(orient="records", double_precision=15))  # the most digits that pandas writes
