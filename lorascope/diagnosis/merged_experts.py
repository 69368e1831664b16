"""Experts of one tensor that have each other's merged weights, recognized by a few entries.

Base and update of an expert belong together, so its change is not an update if its whole weight has another place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorascope.array_types import Float


@dataclass(frozen=True, eq=False)
class ExpertEntries:
    """Entries of the weight of one expert, at the same places for all experts of a tensor.

    Parameters
    ----------
    parameter : str
        Name of the tensor.
    found : array (entries,)
        Entries in the merged model.
    expected : array (entries,)
        Entries of base + update.
    allowed : array (entries,)
        Difference that rounding may cause.
    """

    parameter: str
    found: Float[np.ndarray, "entries"]
    expected: Float[np.ndarray, "entries"]
    allowed: Float[np.ndarray, "entries"]

    def is_at(self, other: ExpertEntries) -> bool:
        """Return whether the place of another expert of the tensor has this expert's weight."""
        if self.parameter != other.parameter or self.found.shape != other.found.shape:
            return False
        return bool((np.abs(other.found - self.expected) <= self.allowed).all())


def swapped_experts(entries: Mapping[str, ExpertEntries]) -> dict[str, str]:
    """Return the experts that have the weight of another expert, and that other expert."""
    owners = {
        module: next((name for name, each in entries.items() if name != module and each.is_at(own)), None)
        for module, own in entries.items()
    }
    return {module: owner for module, owner in owners.items() if owner is not None}
