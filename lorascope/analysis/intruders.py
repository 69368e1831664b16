"""Intruder dimensions: leading singular vectors of a trained weight that are dissimilar to all of the base weight's.

W = W_0 + dW. A left singular vector u of W, one of the k with the largest singular values, is an intruder if its cosine
with every left singular vector of W_0 is small: ``max_j |<u, u_j(W_0)>| < threshold``.

In the coordinates of W_0's singular vectors, W_0 is diagonal, a low-rank update stays low-rank, and the cosines are the
coordinates of u themselves. So once a base weight is decomposed, an adapter is cheap: its factors are projected, and a
Krylov method finds the k singular vectors from a few dozen products with a diagonal plus low-rank matrix.

If singular values of W coincide, their singular vectors are not unique, and neither are the similarities.

Source: Shuttleworth et al. (arXiv 2410.21228), section 3; default threshold and number of singular vectors are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import dia_array, diags_array
from scipy.sparse.linalg import LinearOperator, svds

from lorascope.array_types import Float
from lorascope.runs.layout import Lazy
from lorascope.updates import Update
from lorascope.updates.linalg import all_finite, as_float64

_COLUMNS = {"module": "str", "component": "int64", "sigma": "float64", "similarity": "float64", "intruder": "bool"}
_KRYLOV_SHARE = 4  # for a quarter or more of all directions, a dense decomposition is cheaper


@dataclass(frozen=True, eq=False)
class Basis:
    """Singular value decomposition of a base weight for finding intruders: sigma (m,), U (out, m) and V (in, m).

    There are m = min(out, in) singular values, largest first.
    """

    U: Float[np.ndarray, "out m"]
    sigma: Float[np.ndarray, "m"]
    V: Float[np.ndarray, "in m"]

    @staticmethod
    def of(W0: Float[np.ndarray, "out in"]) -> Basis:
        """Decompose a weight."""
        U, sigma, Vt = np.linalg.svd(as_float64(W0), full_matrices=False)
        return Basis(U, sigma, Vt.T)


def decompose_weights(weights: Mapping[str, Float[np.ndarray, "_ _"]]) -> Mapping[str, Basis]:
    """Decompose a model's base weights to find intruders, each on first access and then cached."""
    return Lazy(list(weights), cache(lambda module: Basis.of(weights[module])))


def find_intruders(
    base: Mapping[str, Basis], updates: Mapping[str, Update], k: int = 10, threshold: float = 0.5
) -> pd.DataFrame:
    """Find intruders: compare leading singular vectors of each trained weight with the most similar of its base weight.

    Parameters
    ----------
    base : mapping module -> Basis
        Decompositions from ``decompose_weights``. Reuse them: other adapters of the same model are then cheap.
    updates : mapping module -> update
        Updates, for example from ``Run.updates`` or ``deltas``.
    k : int
        Number of leading singular vectors to compare, 10 by default, or all if a weight has fewer.
    threshold : float
        A singular vector is an intruder if its largest absolute cosine is below this value, 0.5 by default.

    Returns
    -------
    DataFrame
        ``module, component`` (from 1), ``sigma`` (singular value of W), ``similarity`` (largest absolute cosine),
        ``intruder``. A zero update, or one of rank 0, has no intruders, because it leaves the singular vectors of the
        base weight unchanged. Without any update there are no rows.

    Raises
    ------
    ValueError
        ``k`` is below 1, a base weight is missing or has a different shape, or values are not finite.
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    tables = []
    for module, update in updates.items():
        if module not in base:
            raise ValueError(f"no base weight for module {module!r}; expected one of {', '.join(list(base)[:5])}")
        similarity, sigma = _intruder_similarity(module, base[module], update, k)
        component = np.arange(1, len(sigma) + 1)
        columns = {"module": module, "component": component, "sigma": sigma, "similarity": similarity}
        tables.append(pd.DataFrame(columns | {"intruder": similarity < threshold}))
    if not tables:
        return pd.DataFrame(columns=list(_COLUMNS)).astype(_COLUMNS)
    return pd.concat(tables, ignore_index=True)


def count_intruders(table: pd.DataFrame) -> pd.DataFrame:
    """Count the intruders of every module.

    Returns
    -------
    DataFrame
        ``module, components`` (number compared), ``intruders``.
    """
    modules = table.groupby("module", sort=False)["intruder"]
    return modules.agg(components="size", intruders="sum").reset_index()


def _intruder_similarity(module: str, basis: Basis, update: Update, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest absolute cosine of each leading vector of W with the base's, and the singular values of W."""
    m, thin, shape = len(basis.sigma), update.low_rank, (len(basis.U), len(basis.V))
    factors = [as_float64(update.dense())] if thin is None else [thin.scale * as_float64(thin.B), as_float64(thin.A)]
    if update.shape != shape:
        raise ValueError(f"{module}: update must have the base weight's shape {shape}, got {update.shape}")
    if not all_finite(basis.sigma, *factors):
        raise ValueError(f"{module}: weight and update must be finite, got NaN or infinity")
    if not all(factor.any() for factor in factors):
        # If singular values of the base coincide, a new decomposition could return different singular vectors.
        return np.ones(min(k, m)), basis.sigma[:k]
    few = _KRYLOV_SHARE * k < m
    W: Any  # in coordinates whose first rows belong to U
    if thin is not None:
        left, right = _coordinates(basis.U, factors[0]), _coordinates(basis.V, factors[1].T)
        diagonal = diags_array(basis.sigma, shape=(len(left), len(right)))
        W = _sum_operator(diagonal, left, right) if few else left @ right.T + diagonal.toarray()
    else:
        # Rotating the rows changes no singular value; the part outside U becomes a triangular factor of the same norm.
        W = _coordinates(basis.U, factors[0])
        W[:m] += basis.sigma[:, None] * basis.V.T
    if few:
        start = np.random.default_rng(0).standard_normal(m)  # SciPy's default start vector differs between calls
        U, sigma, _ = svds(W, k, v0=start, return_singular_vectors="u")
    else:
        U, sigma, _ = np.linalg.svd(W, full_matrices=False)
    order = np.argsort(-sigma, kind="stable")[:k]  # SciPy does not guarantee the order of svds
    return np.abs(U[:m, order]).max(axis=0), sigma[order]


def _sum_operator(
    diagonal: dia_array, left: Float[np.ndarray, "rows rank"], right: Float[np.ndarray, "columns rank"]
) -> LinearOperator:
    """Return diagonal + left @ right^T as a linear operator, without forming it."""

    def forward(x: np.ndarray) -> np.ndarray:
        return left @ (right.T @ x.ravel()) + diagonal @ x.ravel()

    def backward(y: np.ndarray) -> np.ndarray:
        return right @ (left.T @ y.ravel()) + diagonal.T @ y.ravel()

    return LinearOperator(diagonal.shape, matvec=forward, rmatvec=backward, dtype=np.float64)


def _coordinates(basis: Float[np.ndarray, "side m"], X: Float[np.ndarray, "side n"]) -> Float[np.ndarray, "rows n"]:
    """Return X in an orthonormal basis that begins with ``basis``, with as few further rows as X needs."""
    inside = basis.T @ X
    if basis.shape[0] == basis.shape[1]:
        return inside
    # The triangular factor has the coordinates of the rest in an orthonormal basis that is never needed itself.
    return np.vstack([inside, np.linalg.qr(X - basis @ inside, mode="r")])
