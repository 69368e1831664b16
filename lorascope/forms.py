"""The forms in which methods keep an update: from the arrays of a snapshot to the update itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lorascope.update import LowRank


def update_from(factors: Mapping[str, np.ndarray], scale: float | int, exact: bool = True) -> LowRank:
    """Build an update from its stored factors.

    Parameters
    ----------
    factors : mapping factor -> array
        ``A`` (rank, in) and ``B`` (out, rank), with ``diagonal`` (rank,) where the update is
        ``scale * B @ diag(diagonal) @ A``.
    scale : float
    exact : bool
        False where the factors stand for an update that depends on the input.
    """
    B = factors["B"] * factors["diagonal"] if "diagonal" in factors else factors["B"]
    return LowRank(B, factors["A"], scale, exact)
