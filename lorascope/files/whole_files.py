"""Whole files: written atomically, and hashed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable
from lorascope.files.typed_json import require_regular

# Errors of a network file system while its server is unavailable, or when a folder is moved during the call.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ENOENT}
PAUSES = (0.5, 5.0)
"""Seconds to wait before the second and third attempts to write a file."""
_PARTIAL = re.compile(r"\..+\.\d+\.part")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file under a temporary name, flush it to disk and rename it.

    A symbolic link is followed.

    Raises
    ------
    OSError
        The disk is full or the path is not writable; the previous file is unchanged. Transient errors of network file
        systems are raised after two more attempts.
    """
    if path.is_symlink():  # renaming would replace the link itself
        path = Path(os.path.realpath(path))
    temporary = draft_path(path)
    for pause in (*PAUSES, None):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                # Before the rename: after a power failure the name could otherwise refer to an empty file.
                os.fsync(file.fileno())
            temporary.replace(path)
            return
        except OSError as error:
            failure = OSError(error.errno, f"cannot write {path}: {error.strerror}")
            if pause is None or error.errno not in _TRANSIENT:
                raise failure from error
            warnings.warn(f"{failure}; retrying in {pause} s", stacklevel=2)
            time.sleep(pause)
        finally:
            temporary.unlink(missing_ok=True)


def draft_path(path: Path) -> Path:
    """Return a temporary name next to a file or folder, which no other process or thread uses."""
    return path.with_name(f".{path.name}.{int.from_bytes(os.urandom(4))}.part")


def require_absent(path: Path) -> None:
    """Raise a FileExistsError if the path of a new folder or file exists."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"cannot create {printable(path)}: it exists, pass a new path")


def write_new(path: Path, data: bytes) -> None:
    """Write a whole new file atomically, as `write_bytes` does; raise a FileExistsError if the path exists."""
    require_absent(path)
    draft = draft_path(path)
    try:
        write_bytes(draft, data)
        _rename_to_new(draft, path)
    except FileExistsError:
        require_absent(path)  # another process wrote it meanwhile
        raise
    finally:
        draft.unlink(missing_ok=True)


def _rename_to_new(draft: Path, path: Path) -> None:
    """Rename a file; raise a FileExistsError if the new path exists."""
    try:
        os.link(draft, path)  # unlike renaming, it never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        path.open("xb").close()
        draft.replace(path)


def json_bytes(content: Any, ascii: bool = False) -> bytes:
    """Encode content as JSON in UTF-8, or in ASCII, where control characters that a terminal interprets are escaped.

    Lone surrogates, from file names outside the locale's encoding, are written as JSON escapes.
    """
    return (json.dumps(content, indent=1, ensure_ascii=ascii) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write a whole JSON file atomically; see `json_bytes`."""
    write_bytes(path, json_bytes(content))


def write_note(file: Path, content: Any) -> None:
    """Write a whole JSON file as `write_json` does, but without waiting for the disk; errors are ignored.

    It is for progress, which is written often, and whose folder another process may remove.
    """
    draft = draft_path(file)
    with suppress(OSError):
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(file)


def is_partial(path: Path) -> bool:
    """Return whether a path is a temporary file that a killed ``write_bytes`` left instead of a whole one."""
    return _PARTIAL.fullmatch(path.name) is not None


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a whole file, in hex."""
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
