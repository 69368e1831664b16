"""What a value of a TOML file may be: whether it fits the type of a field, and how a wrong one is told.

A list stands for several values, a run each; where a value is a list itself, such as ``targets``, a list of lists does.
TOML has no null, so ``"none"`` stands for None wherever None is allowed.
"""

from __future__ import annotations

import difflib
import itertools
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

NONE = "none"
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): f'"{NONE}"'}


def combinations(table: Mapping[str, Any], hints: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All ways to choose one value for every key."""
    choices = [_key_choices(key, value, hints[key]) for key, value in table.items()]
    return [dict(zip(table, chosen, strict=True)) for chosen in itertools.product(*choices)]


def _key_choices(key: str, value: Any, hint: Any) -> list[Any]:
    one = toml_to_value(value, hint)
    if is_of_type(one, hint):
        return [one]
    several = [toml_to_value(item, hint) for item in value] if isinstance(value, list) else []
    if several and all(is_of_type(item, hint) for item in several):
        return several
    raise ValueError(f"{key} = {value!r} must be {describe_type(hint)}, or a list of such values for a run each")


def toml_to_value(value: Any, hint: Any) -> Any:
    """A value as Python has it: None where the file says that there is none, and may."""
    return None if value == NONE and is_of_type(None, hint) else value


def is_of_type(value: Any, hint: Any) -> bool:
    """Is a value, as TOML gives it, of this type? A whole number is no truth value, nor the other way round."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(is_of_type(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (tuple, Sequence):
        return isinstance(value, list | tuple) and all(is_of_type(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(is_of_type(item, arguments[1]) for item in value.values())
    kind = int | float if hint is float else hint  # as PEP 484 has it
    return isinstance(hint, type) and isinstance(value, kind) and (hint is bool or not isinstance(value, bool))


def describe_type(hint: Any) -> str:
    """A type in the words of a user of TOML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(told for each in arguments if (told := describe_type(each))))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (tuple, Sequence):
        return "a list"
    if origin is Mapping:
        return "a table"
    return _WORDS.get(hint, "")


def require_known(given: Collection[str], choice: Collection[str], what: str) -> None:
    """Raise a ValueError about the first name that there is not."""
    for name in given:
        if name not in choice:
            near = difflib.get_close_matches(name, choice, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(choice))}"
            raise ValueError(f"unknown {what} {name!r}; {hint}")
