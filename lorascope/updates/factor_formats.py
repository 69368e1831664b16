"""Conversion of stored factors, such as the arrays of a snapshot, to an update."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from lorascope.updates.fourier import Fourier
from lorascope.updates.low_rank import LowRank

UNTRAINED = frozenset({"gates", "entries", "shape"})
"""Factors that are not trained, but are needed to build the update."""
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Prefixes of the PEFT initializations that subtract B A from the base weights, so that B A starts nonzero."""


def update_from(factors: Mapping[str, np.ndarray], scale: float, exact: bool = True) -> LowRank | Fourier:
    """Build an update from its stored factors.

    Parameters
    ----------
    factors : mapping factor -> array
        ``A`` (rank, in) and ``B`` (out, rank), optionally with ``diagonal`` (rank,): the update is
        ``scale * B @ diag(diagonal) @ A``. With ``gates`` (heads,), there is one ``B`` per expert (heads, out, rank)
        and a shared ``A`` (rank, in) or separate ones (heads, rank, in): the update is
        ``scale * sum(gates[i] * B[i] @ A[i])``. ``coefficients`` (n,), ``entries`` (2, n) and ``shape`` (2,) make a
        Fourier update.
    scale : float
        Factor of the update.
    exact : bool
        False if the update depends on the input and the factors represent it at fixed gates.
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
    """Mix experts into one pair of factors: sum the gated B's if A is shared, else concatenate."""
    if A.ndim == 2:
        return np.tensordot(gates, B, 1), A
    return np.hstack(list(gates[:, None, None] * B)), A.reshape(-1, A.shape[-1])
