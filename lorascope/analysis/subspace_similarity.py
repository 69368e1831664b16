"""Do two runs learn the same directions? LoRA's subspace similarity (section 7.2, Eq. 4) and principal angles.

Every similarity stands beside the value that independent random subspaces would have, max(i, j) / dimension: in a small
model that is far from nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.updates.low_rank import Dense, LowRank, phi_matrix, principal_angles

Side = Literal["A", "B", "update"]


def similarity(first: Float[np.ndarray, "rank1 dim"], second: Float[np.ndarray, "rank2 dim"]) -> pd.DataFrame:
    """Overlap of the top i right-singular directions of one matrix with the top j of another.

    Returns
    -------
    DataFrame
        ``i, j`` (from 1), ``phi`` in [0, 1], and ``phi_random``: its expectation for independent random subspaces.
    """
    phi = phi_matrix(first, second)
    i, j = (index.reshape(-1) + 1 for index in np.indices(phi.shape))
    random = np.maximum(i, j) / first.shape[1]
    return pd.DataFrame({"i": i, "j": j, "phi": phi.reshape(-1), "phi_random": random})


def similarity_of_runs(
    first: Mapping[str, LowRank | Dense], second: Mapping[str, LowRank | Dense], module: str, side: Side = "A"
) -> pd.DataFrame:
    """``similarity`` of two runs in one module.

    Parameters
    ----------
    first, second : mapping module -> update
        As from ``Run.updates``.
    module : str
        A module that both adapted.
    side : {"A", "B", "update"}
        Directions of the paper's A (inputs), of B (outputs), or the input directions of B A, which unlike the factors'
        own do not depend on how the update was split into factors.

    Raises
    ------
    ValueError
        One of the runs did not adapt the module, or its update there has no factors.
    """
    if module not in first or module not in second:
        common = [name for name in first if name in second]
        raise ValueError(f"module {module!r} is not adapted in both runs; these are: {', '.join(common) or 'none'}")
    return similarity(_orient_rows(first[module], side), _orient_rows(second[module], side))


def angles(first: LowRank | Dense, second: LowRank | Dense) -> pd.DataFrame:
    """Principal angles between the output spaces and between the input spaces of two updates of one module.

    Returns
    -------
    DataFrame
        ``side`` ("out" or "in"), ``component`` (from 1), ``degrees`` ascending.
    """
    tables = []
    for side, bases in {"out": (first.left(), second.left()), "in": (first.right(), second.right())}.items():
        degrees = np.sort(np.degrees(principal_angles(*bases)))
        tables.append(pd.DataFrame({"side": side, "component": np.arange(1, len(degrees) + 1), "degrees": degrees}))
    return pd.concat(tables, ignore_index=True)


def _orient_rows(change: LowRank | Dense, side: Side) -> Float[np.ndarray, "rank dim"]:
    """A matrix whose right-singular directions are the wanted ones."""
    if side == "update":
        _, sigma, right = change.svd()
        return (right * sigma).T
    if isinstance(change, Dense):
        raise ValueError(f"a {type(change).__name__} update has no factor {side}: compare with side='update'")
    return change.A if side == "A" else change.B.T
