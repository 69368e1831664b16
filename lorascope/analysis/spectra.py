"""Singular values of updates, and the several numbers that are called a rank.

``effective_rank`` (of sigma / sum sigma) is the one that records hold; ``entropy_rank`` (of sigma^2 / sum sigma^2),
``participation_rank`` and ``energy_rank`` stand beside it, because publications and tools mean any of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope import update
from lorascope.update import Dense, LowRank

_RANKS = ("stable_rank", "effective_rank", "entropy_rank", "participation_rank", "energy_rank")


def spectrum(updates: Mapping[str, LowRank | Dense]) -> pd.DataFrame:
    """Singular values of every module's update.

    Parameters
    ----------
    updates : mapping module -> update
        As from ``Run.updates``.

    Returns
    -------
    DataFrame
        ``module, component`` (from 1), ``sigma``, and ``energy``: the share of |dW|_F^2 in components 1..component,
        0 for an update that is zero.
    """
    tables = []
    for module, sigma in _singular_values(updates).items():
        energy = np.cumsum(sigma**2)
        total = energy[-1] if len(energy) and energy[-1] > 0 else 1.0
        tables.append(
            pd.DataFrame(
                {"module": module, "component": np.arange(1, len(sigma) + 1), "sigma": sigma, "energy": energy / total}
            )
        )
    return pd.concat(tables, ignore_index=True)


def ranks(updates: Mapping[str, LowRank | Dense]) -> pd.DataFrame:
    """Norm and ranks of every module's update, one row a module; the ranks of a zero update are 0.

    Returns
    -------
    DataFrame
        ``module, update_norm, rank, stable_rank, effective_rank, entropy_rank, participation_rank, energy_rank``; the
        last is the number of components that hold 90 % of the energy.
    """
    rows = [
        {"module": module, "update_norm": float(np.linalg.norm(sigma)), "rank": updates[module].rank}
        | {name: getattr(update, name)(sigma) for name in _RANKS}
        for module, sigma in _singular_values(updates).items()
    ]
    return pd.DataFrame(rows)


def largest(updates: Mapping[str, LowRank | Dense]) -> str:
    """The module with the largest update by Frobenius norm."""
    norms = {module: change.norm() for module, change in updates.items()}
    return max(norms, key=norms.__getitem__)


def _singular_values(updates: Mapping[str, LowRank | Dense]) -> dict[str, Float[np.ndarray, "_"]]:
    """Spectra in the mapping's order; factored updates are decomposed together."""
    held = dict(updates)
    if not held:
        raise ValueError("there is no update to take a spectrum of: no module is adapted")
    factored = [name for name, change in held.items() if isinstance(change, LowRank)]
    found = dict(zip(factored, update.spectra([held[name] for name in factored]), strict=True))
    return {name: found[name] if name in found else held[name].singular_values() for name in held}
