"""The forms in which methods keep an update: from the arrays of a snapshot to the update itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from lorascope.updates.fourier import Fourier
from lorascope.updates.low_rank import LowRank

UNTRAINED = frozenset({"gates", "entries", "shape"})
"""Factors that stand beside the trained ones, without which these make no update."""
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""How the names of PEFT's starts begin that take their product off the base, so that B A is not zero at first."""


def update_from(factors: Mapping[str, np.ndarray], scale: float, exact: bool = True) -> LowRank | Fourier:
    """Build an update from its stored factors.

    Parameters
    ----------
    factors : mapping factor -> array
        ``A`` (rank, in) and ``B`` (out, rank), with ``diagonal`` (rank,) where the update is
        ``scale * B @ diag(diagonal) @ A``. With ``gates`` (heads,) there are several B (heads, out, rank), and one A
        for all of them or an A each (heads, rank, in): the update is ``scale * sum(gates[i] * B[i] @ A[i])``.
    scale : float
    exact : bool
        False where the factors stand for an update that depends on the input.
    """
    if "coefficients" in factors:
        outer, inner = factors["shape"].tolist()
        return Fourier(factors["coefficients"], factors["entries"], (outer, inner), scale)
    if "gates" in factors:
        B, A = mix_experts(factors["B"], factors["A"], factors["gates"])
        return LowRank(B, A, scale, exact)
    B = factors["B"] * factors["diagonal"] if "diagonal" in factors else factors["B"]
    return LowRank(B, factors["A"], scale, exact)


def mix_experts(
    B: Float[np.ndarray, "heads out rank"], A: Float[np.ndarray, "*heads rank in"], gates: Float[np.ndarray, "heads"]
) -> tuple[Float[np.ndarray, "out ranks"], Float[np.ndarray, "ranks in"]]:
    """Heads on one A are added up; those with an A each stand beside each other."""
    if A.ndim == 2:
        return np.tensordot(gates, B, 1), A
    return np.hstack(list(gates[:, None, None] * B)), A.reshape(-1, A.shape[-1])
