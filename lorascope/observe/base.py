"""Base class of observers."""

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
    """Object that records quantities of a model during training.

    Parameters
    ----------
    every : int
        Steps between recordings; step 0 and the last step are always recorded.
    """

    every: int = 10
    # Name of a renamed observer in stored runs.
    stored_name: ClassVar[str] = ""

    def due(self, finished: int, total: int) -> bool:
        """Return whether the state after ``finished`` steps should be recorded."""
        return finished % self.every == 0 or finished == total

    def __call__(self, step: Step) -> Iterable[Item]:
        """Return the records of a step; none if it is not due."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Return the JSON form, which is part of a run's identity; renamed fields keep their old names."""
        values = [(f, getattr(self, f.name)) for f in dataclasses.fields(self) if f.init]
        included = [(former(f), value) for f, value in values if not ("later" in f.metadata and value == f.default)]
        name = vars(type(self)).get("stored_name") or type(self).__name__
        return {"name": name} | {before.name: before.to_old(value) for before, value in included}

    def state(self) -> dict[str, Any]:
        """Return the state between steps: each attribute ending in ``_``."""
        return {key: value for key, value in vars(self).items() if key.endswith("_")}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state that ``state`` returned."""
        for key, value in state.items():
            setattr(self, key, value)
