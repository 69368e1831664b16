"""Kronecker products of two small matrices, whose norm and singular values need only those of the two.

    dW = scale * kron(L, R)

Entry [i c + k, j d + l] is scale * L[i, j] * R[k, l], with R of shape (c, d). Singular values are all products of a
singular value of L and one of R. Either matrix may be a low-rank product itself.

Source: LoKr, as in LyCORIS (arXiv 2309.14859), section 4.1.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.updates.low_rank import LowRank
from lorascope.updates.weight_update import Dense, Shapes, Update


@dataclass(frozen=True, eq=False)
class Kronecker(Update, form="kronecker"):
    """Kronecker update scale * kron(left, right).

    Parameters
    ----------
    left, right : Update
        Dense or low-rank matrices, (a, b) and (c, d).
    scale : float
    """

    left: Update
    right: Update
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (a c, b d)."""
        (a, b), (c, d) = self.left.shape, self.right.shape
        return a * c, b * d

    @property
    def rank(self) -> int:
        """Largest possible rank, the product of those of both matrices."""
        left, right = self.left, self.right
        return min(left.rank, *left.shape) * min(right.rank, *right.shape)

    def dense(self) -> Float[np.ndarray, "out in"]:
        """Compute the update as a matrix."""
        return self.scale * np.kron(self.left.dense(), self.right.dense())

    def norm(self) -> float:
        """Compute the Frobenius norm, the product of those of both matrices."""
        return abs(self.scale) * self.left.norm() * self.right.norm()

    def singular_values(self) -> Float[np.ndarray, "k"]:
        """Compute the singular values, largest first."""
        products = np.multiply.outer(self.left.singular_values(), self.right.singular_values())
        return abs(self.scale) * np.sort(products, axis=None)[::-1]

    def to_factors(self) -> dict[str, Any]:
        """Return ``left`` and ``right``, or for a low-rank matrix its factors, as ``left_A`` and ``left_B``."""
        stored = {}
        for side, matrix in (("left", self.left), ("right", self.right)):
            for name, array in matrix.to_factors().items():
                stored[side if name == "matrix" else f"{side}_{name}"] = array
        return stored

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Kronecker:
        """Build an update from the arrays of ``to_factors``."""
        return cls(_matrix(factors, "left"), _matrix(factors, "right"), scale)

    @classmethod
    def fits(cls, shapes: Shapes, floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]) -> bool:
        """See `Update.fits`."""
        for side in ("left", "right"):
            match shapes.get(side), shapes.get(f"{side}_B"), shapes.get(f"{side}_A"):
                case ((_, _), _, _) | (None, (_, _), (_, _)):
                    pass
                case _:
                    return False
            if side not in shapes and shapes[f"{side}_B"][1] != shapes[f"{side}_A"][0]:
                return False
        return all(floats.values())


def _matrix(factors: Mapping[str, Any], side: str) -> Update:
    if side in factors:
        return Dense(factors[side])
    return LowRank(factors[f"{side}_B"], factors[f"{side}_A"])
