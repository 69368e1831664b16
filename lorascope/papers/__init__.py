"""Studies of the papers: one file per paper with its claims, arms, kept tables and figures.

``ls.papers.hydralora.run()`` trains a small version of one of them.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from lorascope.papers.judging.data_folder import PAPERS

NAMES = tuple(map(str.lower, PAPERS))
"""Modules of the nine papers."""


def __getattr__(name: str) -> ModuleType:
    """Import the module of a paper on first use."""
    if name in NAMES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(NAMES)
