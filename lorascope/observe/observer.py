"""Base class of observers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorascope.methods.field_checks import require_integer
from lorascope.methods.method import Stateful, Step, python_number, stored_fields
from lorascope.schema.records import Item

OBSERVERS: dict[str, type[Observer]] = {}
"""Observers by the names that sweep files use, the names of their classes."""


@dataclass(kw_only=True)
class Observer(Stateful):
    """Base class of observers, which record quantities of a model during training.

    The class statement registers a subclass in ``OBSERVERS``.

    Parameters
    ----------
    every : int
        Steps between recordings; step 0 and the last step are always recorded.
    """

    every: int = 10

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        OBSERVERS[cls.__name__] = cls

    def __post_init__(self) -> None:
        require_integer(self, 1, "every")

    def due(self, finished: int, total: int) -> bool:
        """Return whether the state after ``finished`` steps should be recorded."""
        return finished % self.every == 0 or finished == total

    def __call__(self, step: Step) -> Iterable[Item]:
        """Return the records of a step; none if it is not due."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Return the JSON form, which is part of a run's identity."""
        return {"name": type(self).__name__} | {
            name: python_number(value) for name, value in stored_fields(self).items()
        }


def require_observers(observers: Any) -> None:
    """Raise a ValueError unless these are observers in a sequence."""
    if not isinstance(observers, Sequence) or not all(isinstance(observer, Observer) for observer in observers):
        raise ValueError(f"observe must be a list of observers such as [ls.observe.norms()], got {observers!r}")
