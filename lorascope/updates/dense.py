"""Updates given as a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lorascope.updates.base import Update
from lorascope.updates.linalg import as_float64


@dataclass(frozen=True, eq=False)
class Dense(Update, form="dense"):
    """An update given as a matrix.

    Parameters
    ----------
    matrix : array (out, in)
    """

    matrix: Float[np.ndarray, "out in"]
    required = frozenset({"matrix"})

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> Float[np.ndarray, "out in"]:
        """Return the matrix in float64."""
        return as_float64(self.matrix)

    def _stored_matrix(self) -> Float[np.ndarray, "out in"]:
        return self.matrix

    def to_factors(self) -> dict[str, Any]:
        """Return the matrix."""
        return {"matrix": self.matrix}

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Dense:
        """Build an update from its matrix; ``scale`` is not used."""
        return cls(factors["matrix"])
