"""Which tests compare values up to rounding: `make numbers` repeats them on other instruction sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

TOLERANT = {"tolerance", "cells", "trainers"}  # modules whose functions compare values up to rounding
LIBRARIES = {"approx", "allclose", "assert_allclose", "assert_close", "isclose"}


def are_tolerant(values: Iterable[object]) -> bool:
    """Return whether one of the values comes from a module that compares up to rounding."""
    return any(getattr(value, "__module__", None) in TOLERANT for value in values)


def compares_values(function: Callable[..., Any]) -> bool:
    """Return whether a test, or a function of its file that it uses, compares values up to rounding."""
    todo, seen = [inspect.unwrap(function)], set()
    while todo:
        current = todo.pop()
        seen.add(current)
        used = names(current.__code__)
        values = [current.__globals__[name] for name in used if name in current.__globals__]
        if used & LIBRARIES or are_tolerant(values):
            return True
        own = (value for value in values if inspect.isfunction(value) and value.__module__ == current.__module__)
        todo += [value for value in own if value not in seen]
    return False


def names(code: CodeType) -> set[str]:
    """Return the names that a code uses, including those of nested functions."""
    nested = (names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*nested)
