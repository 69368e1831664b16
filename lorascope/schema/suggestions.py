"""Error messages for unknown names, with the nearest valid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, names: Iterable[str]) -> str:
    """Return ``unknown KIND 'x'; did you mean 'y'?``, or the list of valid names if none of them is similar."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown {kind} {name!r}; {hint}"
