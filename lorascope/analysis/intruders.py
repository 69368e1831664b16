"""Intruder dimensions: leading singular vectors of a trained weight that are dissimilar to all of the base weight's.

W = W_0 + dW. A left singular vector u of W, one of the k with the largest singular values, is an intruder if its cosine
with every left singular vector of W_0 is small: ``max_j |<u, u_j(W_0)>| < threshold``.

In the coordinates of W_0's singular vectors, W_0 is diagonal, a low-rank update stays low-rank, and the cosines are the
coordinates of u themselves. So once a base weight is decomposed, an adapter is cheap: its factors are projected, and a
Krylov method finds the k singular vectors from a few dozen products with a diagonal plus low-rank matrix.

If singular values of W coincide, their singular vectors are not unique, and neither are the similarities.

Source: Shuttleworth et al. (arXiv 2410.21228), section 3. The default threshold and number of singular vectors are
ours.
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
from lorascope.updates import Update
from lorascope.updates.linalg import all_finite, as_float64

_COLUMNS = {"module": "str", "component": "int64", "sigma": "float64", "similarity": "float64", "intruder": "bool"}
_KRYLOV_SHARE = 4  # for a quarter or more of all directions, a dense decomposition is cheaper


@dataclass(frozen=True, eq=False)
class Basis:
    """Singular value decomposition U diag(sigma) V^T of a base weight.

    Parameters
    ----------
    U : array (out, m)
        Left singular vectors as columns; m = min(out, in).
    sigma : array (m,)
        Singular values, largest first.
    V : array (in, m)
        Right singular vectors as columns.
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
    """Return the decompositions of a model's weights, each computed on first access and then cached.

    Parameters
    ----------
    weights : mapping module -> array (out, in)
        Base weights W_0.
    """
    return Lazy(list(weights), cache(lambda module: Basis.of(weights[module])))


def intruders(
    base: Mapping[str, Basis], updates: Mapping[str, Update], k: int = 10, threshold: float = 0.5
) -> pd.DataFrame:
    """Compare each leading singular vector of every trained weight with the most similar one of its base weight.

    Parameters
    ----------
    base : mapping module -> Basis
        Decompositions from ``bases``. Reuse them for further adapters of the same model, which are then cheap.
    updates : mapping module -> update
        Updates, for example from ``Run.updates`` or ``deltas``.
    k : int
        Number of singular vectors to compare, those with the largest singular values, 10 by default. Fewer if a weight
        has fewer.
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
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(_COLUMNS)).astype(_COLUMNS)


def count(table: pd.DataFrame) -> pd.DataFrame:
    """Count the intruders of every module.

    Returns
    -------
    DataFrame
        ``module, components`` (number compared), ``intruders``.
    """
    modules = table.groupby("module", sort=False)["intruder"]
    return modules.agg(components="size", intruders="sum").reset_index()


@dataclass(frozen=True, eq=False)
class _Core:
    """W in the coordinates of W_0's singular vectors: diag(sigma), padded with zeros, plus left @ right^T."""

    sigma: Float[np.ndarray, "m"]
    left: Float[np.ndarray, "rows rank"]
    right: Float[np.ndarray, "columns rank"]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns); the smaller one is the number of singular values."""
        return len(self.left), len(self.right)

    def operator(self) -> LinearOperator:
        """Return the matrix as a linear operator, without forming it."""
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
        """Return the matrix itself."""
        matrix = self.left @ self.right.T
        diagonal = np.arange(len(self.sigma))
        matrix[diagonal, diagonal] += self.sigma
        return matrix


def _intruder_similarity(module: str, basis: Basis, update: Update, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest absolute cosine of each leading vector with the base's, and the singular values."""
    core = _core(module, basis, update)
    factors = (core.left, core.right) if isinstance(core, _Core) else (update.dense(),)
    if not all(factor.any() for factor in factors):
        # If singular values of the base coincide, a new decomposition could return different singular vectors.
        sigma = basis.sigma[:k]
        return np.ones(len(sigma)), sigma
    coordinates, sigma = _leading_vectors(core, k)
    return np.abs(coordinates[: len(basis.sigma)]).max(axis=0), sigma


def _core(module: str, basis: Basis, update: Update) -> _Core | Float[np.ndarray, "rows columns"]:
    """Return W in coordinates whose first rows belong to U; for a dense update, as a matrix."""
    product = update.thin
    arrays = (update.dense(),) if product is None else (product.B, product.A)
    if update.shape != basis.shape:
        raise ValueError(f"{module}: update must have the base weight's shape {basis.shape}, got {update.shape}")
    if not all_finite(basis.sigma, *arrays):
        raise ValueError(f"{module}: weight and update must be finite, got NaN or infinity")
    if product is not None:
        left = _coordinates(basis.U, product.scale * as_float64(product.B))
        return _Core(basis.sigma, left, _coordinates(basis.V, as_float64(product.A).T))
    # Rotating the rows changes no singular value; the part outside U becomes a triangular factor of the same norm.
    change = _coordinates(basis.U, as_float64(arrays[0]))
    change[: len(basis.sigma)] += basis.sigma[:, None] * basis.V.T
    return change


def _coordinates(basis: Float[np.ndarray, "side m"], X: Float[np.ndarray, "side n"]) -> Float[np.ndarray, "rows n"]:
    """Return X in an orthonormal basis that begins with ``basis``, with as few further rows as X needs."""
    inside = basis.T @ X
    if basis.shape[0] == basis.shape[1]:
        return inside
    return np.vstack([inside, np.linalg.qr(X - basis @ inside, mode="r")])


def _leading_vectors(core: _Core | Float[np.ndarray, "rows columns"], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k left singular vectors with the largest singular values, and these values, largest first."""
    m = min(core.shape)
    if _KRYLOV_SHARE * k >= m:
        U, sigma, _ = np.linalg.svd(core.dense() if isinstance(core, _Core) else core, full_matrices=False)
        return U[:, :k], sigma[:k]
    start = np.random.default_rng(0).standard_normal(m)  # SciPy's default start vector differs between calls
    operator = core.operator() if isinstance(core, _Core) else core
    U, sigma, _ = svds(operator, k, v0=start, return_singular_vectors="u")
    order = np.argsort(-sigma)
    return U[:, order], sigma[order]
