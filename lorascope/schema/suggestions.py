"""Error messages for unknown names, with the nearest valid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, names: Iterable[str]) -> str:
    """Suggest a similar name, ``unknown KIND 'x'; did you mean 'y'?``, or list the valid names if none is similar."""
    names = list(names)
    hint = f"expected one of {', '.join(names)}"
    if near := difflib.get_close_matches(name, names, n=2):
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {kind} {name!r}; {hint}"
