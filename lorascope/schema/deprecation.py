"""Deprecated names of fields, parameters, attributes and functions, accepted for one release with a FutureWarning.

A renamed field keeps its old name and its old values in the JSON form of a method or an observer. Run ids are computed
from that form, so finished runs keep their ids.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

AnyClass = TypeVar("AnyClass", bound=type)

_FORMER = "former"


@dataclass(frozen=True)
class Former:
    """Old name of a renamed field, and a map from old to new values if the values changed too."""

    name: str
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)

    def to_new(self, value: Any) -> Any:
        """Return the new form of an old value, or of each value in a list."""
        if not self.values:
            return value
        if isinstance(value, list):
            return [self.to_new(item) for item in value]
        # Compare instead of looking up, because a value from a file may not be hashable.
        for old, new in self.values.items():
            if old == value:
                return new
        raise ValueError(f"{self.name} must be one of {', '.join(map(repr, self.values))}, got {value!r}")

    def to_old(self, value: Any) -> Any:
        """Return the old form of a new value; other values are returned unchanged."""
        return next((old for old, new in self.values.items() if new == value), value)


def formerly(name: str, values: Mapping[Any, Any] | None = None) -> dict[str, Any]:
    """Return the metadata of a renamed dataclass field; ``values`` maps old values to new ones."""
    return {_FORMER: Former(name, values or {})}


def former(field: dataclasses.Field[Any]) -> Former:
    """Return the name and values that a field has in JSON: the old ones if it was renamed, else its own."""
    return field.metadata.get(_FORMER, Former(field.name))


def warn_renamed(owner: str, old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that a name is deprecated; the warning points at the caller of the calling function."""
    message = f"{old} is deprecated, use {new}"
    warnings.warn(f"{owner}: {message}" if owner else message, FutureWarning, stacklevel=stacklevel + 1)


def old_fields(cls: type) -> dict[str, tuple[str, Former]]:
    """Return the renamed fields of a dataclass, as a mapping old name -> (new name, ``Former``)."""
    renamed = [field for field in dataclasses.fields(cls) if _FORMER in field.metadata]
    return {former(field).name: (field.name, former(field)) for field in renamed}


def to_new_fields(cls: type, given: Mapping[str, Any], stacklevel: int | None = None) -> dict[str, Any]:
    """Return the given fields under their new names; warn about each old name if ``stacklevel`` is given.

    Raise a ValueError for a field under both names, or an unknown old value.
    """
    renamed, found = old_fields(cls), {}
    for key, value in given.items():
        if key in renamed:
            new, before = renamed[key]
            if new in given:
                raise ValueError(f"{cls.__name__}: cannot use both {new} and its deprecated name {key}")
            if stacklevel is not None:
                warn_renamed(cls.__name__, key, new, stacklevel + 1)
            key, value = new, before.to_new(value)
        found[key] = value
    return found


def accept_old_fields(cls: AnyClass) -> AnyClass:
    """Let a dataclass accept the old names of its fields, as arguments and as attributes."""
    # Typed as Any: a type checker should neither see the old names nor reject the assignment to a method.
    target: Any = cls
    build = target.__init__

    @wraps(build)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **to_new_fields(cls, kwargs, stacklevel=2))

    target.__init__ = init
    for old, (new, before) in old_fields(cls).items():
        setattr(cls, old, old_attribute(old, new, before))
    return cls


def old_attribute(old: str, new: str, before: Former | None = None) -> Any:
    """Return a property for a renamed attribute or method under its old name; it can be set if ``before`` is given."""
    values = before or Former(old)

    def read(self: Any) -> Any:
        warn_renamed(type(self).__name__, old, new)
        return values.to_old(getattr(self, new))

    def write(self: Any, value: Any) -> None:
        warn_renamed(type(self).__name__, old, new)
        setattr(self, new, values.to_new(value))

    return property(read, write if before else None, doc=f"Deprecated: use ``{new}``.")


def accept_old_names(module: str, /, **renamed: str) -> None:
    """Let a module offer its functions and classes under their old names; ``renamed`` maps old to new."""

    def find(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(module, name, renamed[name])
        return getattr(sys.modules[module], renamed[name])

    # Set here and not in the module, so that type checkers do not see the old names.
    vars(sys.modules[module])["__getattr__"] = find
