"""Intruder dimensions: leading directions of a trained weight that resemble none of the base's.

W = W_0 + dW. A left singular vector u of W, one of the k with the largest singular values, is an intruder if its cosine
with every left singular vector of W_0 is small: max_j |<u, u_j(W_0)>| < threshold.

In the coordinates of the base's singular vectors W_0 is diagonal, a low-rank update stays low-rank, and the cosines
are the coordinates of u themselves. So, once a base is decomposed, an adapter costs the projection of its factors and a
few dozen products with a diagonal plus a low-rank matrix, by which a Krylov method finds the k directions.

Where singular values of W coincide, its singular vectors are not determined, and neither is what resembles them.

Source: Shuttleworth et al. (arXiv 2410.21228), section 3. The default threshold and number of directions are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, svds

from lorascope.runs.layout import Lazy
from lorascope.updates.linalg import all_finite, as_float64
from lorascope.updates.low_rank import Dense, LowRank

_COLUMNS = {"module": "str", "component": "int64", "sigma": "float64", "similarity": "float64", "intruder": "bool"}
_KRYLOV_SHARE = 4  # beyond a quarter of all directions a dense decomposition is the cheaper


@dataclass(frozen=True, eq=False)
class Basis:
    """Singular value decomposition of a base's weight, U diag(sigma) V^T.

    Parameters
    ----------
    U : array (out, m)
    sigma : array (m,)
        Largest first; m = min(out, in).
    V : array (in, m)
    """

    U: Float[np.ndarray, "out m"]
    sigma: Float[np.ndarray, "m"]
    V: Float[np.ndarray, "in m"]

    @staticmethod
    def of(W0: Float[np.ndarray, "out in"]) -> Basis:
        """Decompose a weight."""
        U, sigma, Vt = np.linalg.svd(as_float64(W0), full_matrices=False)
        return Basis(U, sigma, Vt.T)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.U.shape[0], self.V.shape[0]


def bases(weights: Mapping[str, Float[np.ndarray, "_ _"]]) -> Mapping[str, Basis]:
    """The decompositions of a model's weights, each made when it is first asked for and then kept.

    Parameters
    ----------
    weights : mapping module -> array (out, in)
        W_0.
    """
    return Lazy(list(weights), cache(lambda module: Basis.of(weights[module])))


def intruders(
    base: Mapping[str, Basis], updates: Mapping[str, LowRank | Dense], k: int = 10, threshold: float = 0.5
) -> pd.DataFrame:
    """How much each leading direction of every trained weight resembles the base's most similar one.

    Parameters
    ----------
    base : mapping module -> Basis
        From ``bases``; kept, it makes the second adapter of a model cheap.
    updates : mapping module -> update
        As from ``Run.updates`` or ``deltas``.
    k : int
        Directions looked at, those with the largest singular values; fewer where a weight has fewer.
    threshold : float
        A direction is an intruder if its largest |cosine| lies below.

    Returns
    -------
    DataFrame
        ``module, component`` (from 1), ``sigma`` (singular value of W), ``similarity`` (largest |cosine|),
        ``intruder``. An update that is zero, or of rank 0, leaves the base's own directions: no intruder. No update
        at all gives no rows.

    Raises
    ------
    ValueError
        k is below 1, a base is missing or of another shape, or numbers are not finite.
    """
    if k < 1:
        raise ValueError(f"k = {k} directions are none to look at: give 1 or more")
    tables = []
    for module, update in updates.items():
        if module not in base:
            raise ValueError(f"no base weight of {module!r}; there are {', '.join(list(base)[:5])}")
        similarity, sigma = _intruder_similarity(module, base[module], update, k)
        component = np.arange(1, len(sigma) + 1)
        told = {"module": module, "component": component, "sigma": sigma, "similarity": similarity}
        tables.append(pd.DataFrame(told | {"intruder": similarity < threshold}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(_COLUMNS)).astype(_COLUMNS)


def count(table: pd.DataFrame) -> pd.DataFrame:
    """Intruders of every module.

    Returns
    -------
    DataFrame
        ``module, components`` (looked at), ``intruders``.
    """
    modules = table.groupby("module", sort=False)["intruder"]
    return modules.agg(components="size", intruders="sum").reset_index()


@dataclass(frozen=True, eq=False)
class _Core:
    """W in the coordinates of W_0's singular vectors: diag(sigma), with zeros around it, plus left @ right^T."""

    sigma: Float[np.ndarray, "m"]
    left: Float[np.ndarray, "rows rank"]
    right: Float[np.ndarray, "columns rank"]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns); the smaller is the number of sigma."""
        return len(self.left), len(self.right)

    def operator(self) -> LinearOperator:
        """The matrix as what it does to a vector."""
        m = len(self.sigma)

        def times(x: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
            product = left @ (right.T @ x.ravel())
            product[:m] += self.sigma * x.ravel()[:m]
            return product

        def forward(x: np.ndarray) -> np.ndarray:
            return times(x, self.left, self.right)

        def backward(y: np.ndarray) -> np.ndarray:
            return times(y, self.right, self.left)

        return LinearOperator(self.shape, matvec=forward, rmatvec=backward, dtype=np.float64)

    def dense(self) -> Float[np.ndarray, "rows columns"]:
        """The matrix itself."""
        matrix = self.left @ self.right.T
        diagonal = np.arange(len(self.sigma))
        matrix[diagonal, diagonal] += self.sigma
        return matrix


def _intruder_similarity(module: str, basis: Basis, update: LowRank | Dense, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest |cosine| of each leading direction with any of the base's, and the singular values."""
    core = _core(module, basis, update)
    factors = (core.left, core.right) if isinstance(core, _Core) else (update.dense(),)
    if not all(factor.any() for factor in factors):
        # Where singular values of the base coincide, a decomposition would find other directions than its own.
        sigma = basis.sigma[:k]
        return np.ones(len(sigma)), sigma
    coordinates, sigma = _leading_vectors(core, k)
    return np.abs(coordinates[: len(basis.sigma)]).max(axis=0), sigma


def _core(module: str, basis: Basis, update: LowRank | Dense) -> _Core | Float[np.ndarray, "rows columns"]:
    """W in coordinates whose first rows belong to U; for a dense update, the matrix."""
    arrays = (update.B, update.A) if isinstance(update, LowRank) else (update.dense(),)
    if update.shape != basis.shape:
        raise ValueError(f"{module}: the update is {update.shape}, the base's weight {basis.shape}")
    if not all_finite(basis.sigma, *arrays):
        raise ValueError(f"{module}: weight or update hold NaN or infinity, which have no directions")
    if isinstance(update, LowRank):
        left = _coordinates(basis.U, update.scale * as_float64(update.B))
        return _Core(basis.sigma, left, _coordinates(basis.V, as_float64(update.A).T))
    # A rotation of the rows changes no singular value; what lies outside U keeps its length in a triangle.
    change = _coordinates(basis.U, as_float64(arrays[0]))
    change[: len(basis.sigma)] += basis.sigma[:, None] * basis.V.T
    return change


def _coordinates(basis: Float[np.ndarray, "side m"], X: Float[np.ndarray, "side n"]) -> Float[np.ndarray, "rows n"]:
    """X in an orthonormal basis that begins with ``basis``; what lies outside needs as few further rows as it can."""
    inside = basis.T @ X
    if basis.shape[0] == basis.shape[1]:
        return inside
    return np.vstack([inside, np.linalg.qr(X - basis @ inside, mode="r")])


def _leading_vectors(core: _Core | Float[np.ndarray, "rows columns"], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k left singular vectors with the largest singular values, and these, largest first."""
    m = min(core.shape)
    if _KRYLOV_SHARE * k >= m:
        U, sigma, _ = np.linalg.svd(core.dense() if isinstance(core, _Core) else core, full_matrices=False)
        return U[:, :k], sigma[:k]
    start = np.random.default_rng(0).standard_normal(m)  # that of scipy would differ from call to call
    operator = core.operator() if isinstance(core, _Core) else core
    U, sigma, _ = svds(operator, k, v0=start, return_singular_vectors="u")
    order = np.argsort(-sigma)
    return U[:, order], sigma[order]
