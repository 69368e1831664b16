"""What an observer is: something that looks at steps, by itself or as one of those in ``observe``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from lorascope.methods.base import Step
from lorascope.schema.deprecation import former
from lorascope.schema.records import Item


@dataclass(kw_only=True)
class Observer:
    """Something that looks at a step.

    Parameters
    ----------
    every : int
        Steps between two looks; step 0 and the last step are always looked at.
    """

    every: int = 10
    # The name in stored runs of an observer that was renamed.
    stored_name: ClassVar[str] = ""

    def due(self, finished: int, total: int) -> bool:
        """Is the state after ``finished`` steps to be looked at?"""
        return finished % self.every == 0 or finished == total

    def __call__(self, step: Step) -> Iterable[Item]:
        """Look at a step."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The JSON form, part of a run's identity; what was renamed keeps its old name."""
        values = [(f, getattr(self, f.name)) for f in dataclasses.fields(self) if f.init]
        told = [(former(f), value) for f, value in values if not ("later" in f.metadata and value == f.default)]
        name = vars(type(self)).get("stored_name") or type(self).__name__
        return {"name": name} | {before.name: before.to_old(value) for before, value in told}

    def state(self) -> dict[str, Any]:
        """What is remembered between steps: each attribute ending in ``_``."""
        return {key: value for key, value in vars(self).items() if key.endswith("_")}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        for key, value in state.items():
            setattr(self, key, value)
