"""Manifest of the evidence: SHA-256 of every file, in the format of ``sha256sum``."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lorascope.files.typed_json import MAX_BYTES, read_text, require_small


def digest(file: Path) -> str:
    """Return the SHA-256 of a file of the evidence; raise a ValueError if it is too large for a manifest."""
    require_small(file, MAX_BYTES)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def manifest(folder: str | Path) -> str:
    """Return SHA-256 and path of every file of a folder except ``MANIFEST``, as ``sha256sum`` prints them."""
    folder = Path(folder)
    # Sorted, because file systems list files in different orders.
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "MANIFEST")
    return "".join(f"{digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths)


def parse_digests(manifest: str) -> dict[str, str]:
    """Return the digests of a manifest by path."""
    digests = {}
    for line in manifest.splitlines():
        digest, _, path = line.partition("  ")
        digests[path] = digest
    return digests


def kept_digests(folder: Path) -> dict[str, str]:
    """Return the digests of the kept manifest by path; none if the folder has no manifest."""
    file = folder / "MANIFEST"
    if not file.exists():
        return {}
    return parse_digests(read_text(file))
