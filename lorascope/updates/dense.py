"""Updates given as a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lorascope.updates.base import Update
from lorascope.updates.linalg import as_float64, tiles


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

    def norm(self) -> float:
        """Compute the Frobenius norm, without a copy of the matrix in float64."""
        return float(np.sqrt(sum(np.vdot(tile, tile) for tile in tiles(self.matrix))))

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


@dataclass(frozen=True, eq=False)
class Pair:
    """A weight before and after training.

    Parameters
    ----------
    W0, W : arrays (out, in)
    """

    W0: Float[np.ndarray, "out in"]
    W: Float[np.ndarray, "out in"]

    @property
    def update(self) -> Dense:
        """The update W - W_0."""
        return Dense(as_float64(self.W) - self.W0)

    def weight_norm(self) -> float:
        """Compute ``|W|_F``."""
        return Dense(self.W).norm()

    def relative_update(self) -> float:
        """Compute ``|W - W_0|_F / |W_0|_F``: 0 for a zero update, infinity for an update of a zero weight."""
        update, weight = self.update.norm(), Dense(self.W0).norm()
        if update == 0.0:
            return 0.0
        return update / weight if weight else np.inf
