"""Updates of DoRA: a low-rank direction and a magnitude per output.

    ``W = m V / |V|``, by row, with V = W_0 + scale * B @ A

The update W - W_0 depends on W_0. Without it, only the update of the direction is known, scale * B @ A. LyCORIS and
OneTrainer can also learn a magnitude per input; in a convolution, the columns of one input channel share it.

Source: DoRA (arXiv 2402.09353), equation 5, with the row norms of (out, in), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.updates.linalg import as_float64
from lorascope.updates.low_rank import LowRank
from lorascope.updates.weight_update import Shapes, Update


@dataclass(frozen=True, eq=False)
class WeightDecomposed(Update, form="weight_decomposed"):
    """Weight-decomposed update ``m V / |V| - W_0`` if W_0 is given, else ``scale * B @ A``.

    Parameters
    ----------
    B : array (out, rank)
    A : array (rank, in)
    magnitude : array (out,) or (1, inputs)
        m, the norms of the rows of the weight, or of its columns, in ``inputs`` groups of neighbors.
    scale : float
    W0 : array (out, in), optional
    """

    B: Float[np.ndarray, "out rank"]
    A: Float[np.ndarray, "rank in"]
    magnitude: Float[np.ndarray, "out"] | Float[np.ndarray, "1 inputs"]
    scale: float = 1.0
    W0: Float[np.ndarray, "out in"] | None = None
    required = frozenset({"A", "B", "magnitude"})
    needs_weight = True

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of components of the direction."""
        return self.B.shape[1]

    @property
    def whole(self) -> bool:
        """Whether W_0 is known."""
        return self.W0 is not None

    @property
    def direction(self) -> LowRank:
        """The update of the direction, V - W_0."""
        return LowRank(self.B, self.A, self.scale)

    @property
    def low_rank(self) -> LowRank | None:
        """The direction if W_0 is unknown; the whole update is not a product of low-rank factors."""
        return self.direction if self.W0 is None else None

    def dense(self) -> Float[np.ndarray, "out in"]:
        """Compute the update as a matrix."""
        if self.W0 is None:
            return self.direction.dense()
        return set_magnitude(self.direction.dense() + self.W0, self.magnitude) - self.W0

    def norm(self) -> float:
        """Compute the Frobenius norm."""
        return super().norm() if self.low_rank is None else self.low_rank.norm()

    def singular_values(self) -> Float[np.ndarray, "k"]:
        """Compute the singular values, largest first."""
        return super().singular_values() if self.low_rank is None else self.low_rank.singular_values()

    def svd(self) -> tuple[Float[np.ndarray, "out k"], Float[np.ndarray, "k"], Float[np.ndarray, "in k"]]:
        """See `Update.svd`; of the factors if W_0 is unknown."""
        return super().svd() if self.low_rank is None else self.low_rank.svd()

    def __sub__(self, other: Update) -> Update:
        """See `Update.__sub__`; of the factors if W_0 is unknown."""
        return super().__sub__(other) if self.low_rank is None else self.low_rank - other

    def to_factors(self) -> dict[str, Any]:
        """Return A, B, the magnitude and, if it is known, W_0."""
        base = {} if self.W0 is None else {"W0": self.W0}
        return {"A": self.A, "B": self.B, "magnitude": self.magnitude, **base}

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> WeightDecomposed:
        """Build an update from A, B, ``magnitude`` and optionally ``W0``."""
        return cls(factors["B"], factors["A"], factors["magnitude"], scale, factors.get("W0"))

    @classmethod
    def fits(cls, shapes: Shapes, floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]) -> bool:
        """See `Update.fits`."""
        match shapes:
            case {"A": (rank, _), "B": (outer, width), "magnitude": (rows,)}:
                return rank == width and outer == rows and all(floats.values())
        return False


def set_magnitude(
    V: Float[np.ndarray, "out in"], magnitude: Float[np.ndarray, "out"] | Float[np.ndarray, "1 inputs"]
) -> Float[np.ndarray, "out in"]:
    """Rescale a decomposed weight's rows, or its columns, to the norms ``magnitude``; see `WeightDecomposed`."""
    norms = as_float64(magnitude)
    # A zero row has no direction; PEFT also divides by zero there.
    if norms.ndim == 1:
        return V * (norms.reshape(-1, 1) / np.linalg.norm(V, axis=1, keepdims=True))
    groups = V.reshape(len(V), norms.size, -1)
    return (groups * (norms.reshape(1, -1, 1) / np.linalg.norm(groups, axis=(0, 2), keepdims=True))).reshape(V.shape)
