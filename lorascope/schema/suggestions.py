"""Error messages for unknown names, with the nearest valid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, names: Iterable[str]) -> str:
    """Return ``unknown KIND 'x'; did you mean 'y'?``, or the list of valid names if none of them is similar."""
    names = list(names)
    hint = f"expected one of {', '.join(names)}"
    if near := difflib.get_close_matches(name, names, n=2):
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {kind} {name!r}; {hint}"
