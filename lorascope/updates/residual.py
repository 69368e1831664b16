"""Updates of factors that start at B_0, A_0 on a weight from which their product was subtracted (PiSSA, OLoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lorascope.updates.linalg import as_float64
from lorascope.updates.low_rank import LowRank


class Residual(LowRank, form="residual"):
    """The update scale * (B @ A - B_0 @ A_0), as one pair of factors of twice the rank.

    Parameters
    ----------
    B, B0 : array (out, rank)
    A, A0 : array (rank, in)
    scale : float
    """

    parts: dict[str, Float[np.ndarray, "..."]]
    required = frozenset({"A", "B", "A0", "B0"})
    constants = frozenset({"A0", "B0"})

    def __init__(
        self,
        B: Float[np.ndarray, "out rank"],
        A: Float[np.ndarray, "rank in"],
        B0: Float[np.ndarray, "out rank"],
        A0: Float[np.ndarray, "rank in"],
        scale: float = 1.0,
    ) -> None:
        # (B - B_0) A + B_0 (A - A_0) is exactly zero at the start; the difference of two products is a rounding error.
        b, a, b0, a0 = map(as_float64, (B, A, B0, A0))
        super().__init__(np.hstack([b - b0, b0]), np.vstack([a, a - a0]), scale)
        # Write to the instance dict, because the base class is a frozen dataclass.
        vars(self)["parts"] = {"A": A, "B": B, "A0": A0, "B0": B0}

    def to_factors(self) -> dict[str, Any]:
        """Return A, B and their initial values A0, B0."""
        return self.parts

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Residual:
        """Build an update from A, B, A0 and B0."""
        return cls(factors["B"], factors["A"], factors["B0"], factors["A0"], scale)

    @classmethod
    def fits(
        cls, shapes: Mapping[str, tuple[int, ...]], floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]
    ) -> bool:
        """See `Update.fits`."""
        same = all(shapes[f"{name}0"] == shapes[name] for name in "AB")
        return same and LowRank.fits({name: shapes[name] for name in "AB"}, floats, arrays) and all(floats.values())
