"""Similarity of the subspaces two runs learn: LoRA's measure (section 7.2, Eq. 4).

Each is reported with its expectation for independent random subspaces, max(i, j) / dimension, large in small models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd

from lorascope.array_types import Float
from lorascope.updates import Update, phi_matrix

Side = Literal["A", "B", "update"]


def similarity(first: Float[np.ndarray, "rank1 dim"], second: Float[np.ndarray, "rank2 dim"]) -> pd.DataFrame:
    """Compute the similarity of two subspaces: top i right singular vectors of one matrix, and top j of another.

    Returns
    -------
    DataFrame
        ``i, j`` (from 1), ``phi`` in [0, 1], and ``phi_random``, its expectation for independent random subspaces.
    """
    phi = phi_matrix(first, second)
    i, j = np.indices(phi.shape).reshape(2, -1) + 1
    # E |U^T V|_F^2 is i j / d for random subspaces, and phi divides by min(i, j).
    random = np.maximum(i, j) / first.shape[1]
    return pd.DataFrame({"i": i, "j": j, "phi": phi.reshape(-1), "phi_random": random})


def similarity_of_runs(
    first: Mapping[str, Update], second: Mapping[str, Update], module: str, side: Side = "A"
) -> pd.DataFrame:
    """Compute the ``similarity`` of the subspaces of two runs in one module.

    Parameters
    ----------
    first, second : mapping module -> update
        Updates of the two runs, see ``Run.updates``.
    module : str
        A module that both runs adapt.
    side : {"A", "B", "update"}
        Directions to compare: those of the paper's A (inputs, the default), of B (outputs), or the input directions of
        B A. Only the last are independent of how the update is split into factors.

    Raises
    ------
    ValueError
        One of the runs does not adapt the module, or its update has no factors and ``side`` is "A" or "B".
    """
    common = [name for name in first if name in second]
    if module not in common:
        names = ", ".join(common) or "none"
        raise ValueError(f"module {module!r} is not adapted in both runs; expected one of {names}")
    return similarity(_orient_rows(first[module], side), _orient_rows(second[module], side))


def _orient_rows(change: Update, side: Side) -> Float[np.ndarray, "rank dim"]:
    """Return a matrix whose right singular vectors are the directions of this side."""
    if side == "update":
        _, sigma, right = change.svd()
        return (right * sigma).T  # the scale puts the right singular vectors in the order of the update's
    if change.low_rank is None:
        kind = type(change).__name__
        raise ValueError(f"cannot compare side {side!r}: a {kind} update has no factor {side}. Use side='update'")
    return change.low_rank.A if side == "A" else change.low_rank.B.T
