"""Types of TOML values: whether a value fits the type of a field, and the error if it does not.

A list means several values, with one run per value. If the value itself is a list, such as ``targets``, use a list of
lists. TOML has no null, so ``"none"`` means None wherever None is allowed.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from lorascope.schema.suggestions import unknown_name

NONE = "none"
_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): f'"{NONE}"'}


def combinations(table: Mapping[str, Any], hints: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all combinations of one value per key."""
    choices = []
    for key, value in table.items():
        hint, one = hints[key], toml_to_value(value, hints[key])
        several = [toml_to_value(item, hint) for item in value] if isinstance(value, list) else []
        if is_of_type(one, hint):
            several = [one]
        elif not several or not all(is_of_type(item, hint) for item in several):
            allowed = f"{describe_type(hint)}, or a list of these (one run per value)"
            raise ValueError(f"{key} must be {allowed}, got {value!r}")
        choices.append(several)
    return [dict(zip(table, chosen, strict=True)) for chosen in itertools.product(*choices)]


def toml_to_value(value: Any, hint: Any) -> Any:
    """Convert a value to Python: "none" becomes None if the type allows None."""
    return None if value == NONE and is_of_type(None, hint) else value


def is_of_type(value: Any, hint: Any) -> bool:
    """Return whether a TOML value has this type. An integer is not a boolean, and a boolean not an integer."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(is_of_type(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (tuple, Sequence):
        return isinstance(value, list | tuple) and all(is_of_type(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(is_of_type(item, arguments[1]) for item in value.values())
    kind = int | float if hint is float else hint  # PEP 484 accepts an int as a float
    return isinstance(hint, type) and isinstance(value, kind) and (hint is bool or not isinstance(value, bool))


def describe_type(hint: Any) -> str:
    """Describe a type in the terms of TOML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(name for each in arguments if (name := describe_type(each))))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (tuple, Sequence):
        return "a list"
    if origin is Mapping:
        return "a table"
    return _WORDS.get(hint, "")


def require_type(key: str, value: Any, hint: Any) -> None:
    """Raise ValueError if the value of a key does not have this type."""
    if not is_of_type(value, hint):
        raise ValueError(f"{key} must be {describe_type(hint)}, got {value!r}")


def require_known(given: Collection[str], choice: Collection[str], what: str) -> None:
    """Raise ValueError for the first unknown name."""
    for name in given:
        if name not in choice:
            raise ValueError(unknown_name(what, name, sorted(choice)))
