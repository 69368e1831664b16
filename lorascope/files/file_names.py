"""Names of files and folders that come from other files."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath


def is_plain(name: str) -> bool:
    """Return whether a name from a file, such as a shard's in an index, is a plain file name on every system."""
    # Windows also separates by backslashes and colons, so its names are plain everywhere.
    return name not in ("", ".", "..") and "\0" not in name and PureWindowsPath(name).name == name


def folder_of(path: Path) -> Path:
    """Return a folder itself, and the folder of a file."""
    return path if path.is_dir() else path.parent
