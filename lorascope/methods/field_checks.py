"""Checks and defaults of the fields of methods, settings and observers."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

LARGEST_FLOAT = 3.4028234663852886e38  # of float32
_LARGEST_INTEGER = 2**63 - 1  # torch and tokenizers store sizes in 64 bits


def require(settings: object, name: str, allowed: str, valid: bool) -> None:
    """Raise a ValueError with the value of a field of a method or settings and what is ``allowed``, unless valid."""
    if not valid:
        value = getattr(settings, name)
        raise ValueError(f"{name} must be {allowed}, got {repr(value) if isinstance(value, str) else value}")


def is_integer(value: Any) -> bool:
    """Return whether a value of a method or settings is an integer, also of numpy, and not a bool."""
    # An integer of numpy is not an int but has __index__, as True has.
    return hasattr(value, "__index__") and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value of a method or settings is a real number, also of numpy, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_integer(settings: object, minimum: int, *names: str) -> None:
    """Raise a ValueError unless these fields of a method or settings are integers >= ``minimum`` or None by default.

    Integers beyond 64 bits are rejected as well.
    """
    for name in names:
        value = getattr(settings, name)
        # None is valid where it is the default.
        unset = value is None and getattr(type(settings), name, minimum) is None
        require(settings, name, f"an integer >= {minimum}", unset or (is_integer(value) and value >= minimum))
        if not unset:
            require(settings, name, f"at most {_LARGEST_INTEGER}", value <= _LARGEST_INTEGER)


def require_at_least(settings: object, minimum: int, *names: str) -> None:
    """Raise a ValueError unless each of these fields of a method or optimizer is None or at least ``minimum``."""
    for name in names:
        value = getattr(settings, name)
        require(settings, name, f">= {minimum}", value is None or value >= minimum)


def require_choice(settings: object, name: str, choices: Iterable[str]) -> None:
    """Raise a ValueError unless the field ``name`` of a method or settings is one of the choices."""
    require(settings, name, f"one of {', '.join(map(repr, choices))}", getattr(settings, name) in choices)


def require_scaling(settings: Any) -> None:
    """Raise a ValueError unless the fields ``alpha`` and ``dropout`` of a method allow training."""
    require(settings, "alpha", "> 0 and finite in float32", 0 < settings.alpha <= LARGEST_FLOAT)
    require(settings, "dropout", "in [0, 1)", 0 <= settings.dropout < 1)


def literal_fields(settings: type) -> dict[str, tuple[Any, ...]]:
    """Return the values of every field of a method's class that is annotated with ``Literal``."""
    hints = get_type_hints(settings).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


def require_literals(settings: Any) -> None:
    """Raise a ValueError unless every field of a method annotated with ``Literal`` has one of its values."""
    for name, values in literal_fields(type(settings)).items():
        require_choice(settings, name, values)


def default_if_none(value: T | None, default: T) -> T:
    """Return the value of a method's setting, or its default if it is None."""
    return default if value is None else value
