"""Seals: marks by which lorascope recognizes a file that it wrote and that has not changed since.

A seal is the SHA-256 of the rest of the file, near its end: a comment in HTML, Markdown, SVG, PDF and PGF, a text chunk
in PNG, the last property in JSON. The seal of a CSV file is in the JSON file that describes it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path

from lorascope.files.printable import printable
from lorascope.files.typed_json import parse_json
from lorascope.files.whole_files import file_hash, json_bytes, write_bytes

MAX_PAGE = 2**27
"""Maximum bytes of a page or log that is read again: enough for an adapter with 100,000 modules."""
_COMMENT = (b"<!-- lorascope sha256 ", b" -->\n")
_MARKS = {
    "html": _COMMENT,
    "md": _COMMENT,
    "svg": _COMMENT,
    **dict.fromkeys(("pdf", "pgf"), (b"% lorascope sha256 ", b"\n")),
    # SARIF allows further properties only there.
    "json": (b',\n "properties": {\n  "lorascope_sha256": "', b'"\n }'),
}
# Bytes that have to be the last: the chunk IEND, and the end of an object.
_TAILS = {"png": 12, "json": len(b"\n}\n")}


def seal(content: bytes, kind: str) -> bytes:
    """Return the content of a file with its seal.

    Parameters
    ----------
    content : bytes
        Whole file; JSON as `whole_files.json_bytes` writes an object.
    kind : str
        Extension without the dot.
    """
    end = len(content) - _TAILS.get(kind, 0)
    return content[:end] + _mark(content, kind) + content[end:]


def _mark(content: bytes, kind: str) -> bytes:
    digest = hashlib.sha256(content).hexdigest().encode()
    if kind == "png":
        chunk = b"tEXtlorascope_sha256\0" + digest
        return struct.pack(">I", len(chunk) - len(b"tEXt")) + chunk + struct.pack(">I", zlib.crc32(chunk))
    before, after = _MARKS[kind]
    return before + digest + after


def _is_sealed(content: bytes, kind: str) -> bool:
    end = len(content) - _TAILS.get(kind, 0)
    start = end - len(_mark(b"", kind))
    return start > 0 and seal(content[:start] + content[end:], kind) == content


def require_own(path: Path, kind: str | None = None) -> None:
    """Raise a FileExistsError if a path exists and is not a file that lorascope wrote, unchanged.

    ``kind`` is its extension by default.
    """
    kind = kind or path.suffix.lower().removeprefix(".")
    if kind == "csv":
        _require_own_table(path)
    elif path.exists() and not _is_sealed(_content(path), kind):
        raise _foreign_file(path)


def _content(path: Path) -> bytes:
    """Return the content of a file, or none if lorascope writes no such file."""
    if path.is_file() and path.stat().st_size <= MAX_PAGE:
        return path.read_bytes()
    return b""


def _require_own_table(path: Path) -> None:
    about = metadata_file(path)
    if not about.exists():
        if path.exists():
            raise _foreign_file(path)
        return
    content = _content(about)
    if not _is_sealed(content, "json"):
        raise _foreign_file(about)
    described = parse_json(content, about)
    if described.get("url") != path.name:
        raise _foreign_file(about)
    hashes = described.get("sha256"), described.get("replaced_sha256")
    if path.exists() and (not path.is_file() or file_hash(path) not in hashes):
        raise _foreign_file(path)


def metadata_file(path: Path) -> Path:
    """Return the path of the file that describes a CSV file."""
    return path.with_name(f"{path.name}-metadata.json")


def _foreign_file(path: Path) -> FileExistsError:
    reason = "it exists and was not written by lorascope, or has changed since; pass another name"
    return FileExistsError(f"cannot write {printable(path)}: {reason}")


def write_own(path: Path, content: bytes, kind: str | None = None) -> None:
    """Write a file with a seal, atomically; errors as in `require_own`."""
    require_own(path, kind)
    write_bytes(path, seal(content, kind or path.suffix.lower().removeprefix(".")))


def write_table(path: Path, content: bytes, about: dict[str, object]) -> None:
    """Write a CSV file, and next to it the file that describes it; see https://www.w3.org/TR/tabular-data-primer/."""
    described = about | {"url": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    # The description is first, and includes the table that is replaced, so that each kill leaves files that are own.
    replaced = {"replaced_sha256": file_hash(path)} if path.is_file() else {}
    _write_description(path, described | replaced)
    write_bytes(path, content)
    if replaced:
        _write_description(path, described)


def _write_description(path: Path, described: dict[str, object]) -> None:
    write_bytes(metadata_file(path), seal(json_bytes(described, ascii=True), "json"))
