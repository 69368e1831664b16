"""Folder ``data`` of a clone of the repository, or of the installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# A wheel contains the folder data, and a clone has it next to the package.
DATA = _PACKAGE / "data"
if not DATA.exists():
    DATA = _PACKAGE.parent / "data"
