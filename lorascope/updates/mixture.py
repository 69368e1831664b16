"""Updates of several experts, weighted by gates that depend on the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lorascope.updates.low_rank import LowRank


class Mixture(LowRank, form="mixture"):
    """The update scale * sum(gates[i] * B_i @ A_i) at fixed gates, as one pair of factors.

    Parameters
    ----------
    experts : array (heads, out, rank)
        B of every expert.
    A : array (rank, in) or (heads, rank, in)
        One A for all experts, or one for each.
    gates : array (heads,)
    scale : float
    exact : bool
        True if the gates are the same for every input.
    """

    experts: Float[np.ndarray, "heads out rank"]
    own_A: Float[np.ndarray, "*heads rank in"]
    gate_weights: Float[np.ndarray, "heads"]
    required = frozenset({"A", "B", "gates"})
    constants = frozenset({"gates"})

    def __init__(
        self,
        experts: Float[np.ndarray, "heads out rank"],
        A: Float[np.ndarray, "*heads rank in"],
        gates: Float[np.ndarray, "heads"],
        scale: float = 1.0,
        exact: bool = False,
    ) -> None:
        if A.ndim == 2:
            super().__init__(np.tensordot(gates, experts, 1), A, scale, exact)
        else:
            mixed = np.hstack(list(gates[:, None, None] * experts))
            super().__init__(mixed, A.reshape(-1, A.shape[-1]), scale, exact)
        # Write to the instance dict, because the base class is a frozen dataclass.
        vars(self).update(experts=experts, own_A=A, gate_weights=gates)

    def to_factors(self) -> dict[str, Any]:
        """Return A, B (heads, out, rank) and the gates."""
        return {"A": self.own_A, "B": self.experts, "gates": self.gate_weights}

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Mixture:
        """Build an update from A, B (heads, out, rank) and ``gates`` (heads,)."""
        return cls(factors["B"], factors["A"], factors["gates"], scale, exact)

    @classmethod
    def fits(
        cls, shapes: Mapping[str, tuple[int, ...]], floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]
    ) -> bool:
        """See `Update.fits`."""
        match shapes:
            case {"gates": (heads,), "A": (*number, rank, _), "B": (count, _, width)}:
                return heads == count > 0 and rank == width and number in ([], [heads]) and all(floats.values())
        return False
