"""Low-rank and dense updates: norms, singular values, subspaces and ranks, in float64 and without torch.

An update dW has the shape (out, in). ``LowRank`` stores factors and multiplies them only if a matrix is requested;
``Dense`` is a plain matrix. Both have the same methods. All computations use float64, regardless of the input dtype.

The ranks of a zero update are 0.0. If an array contains NaN or infinity, singular values and ranks are NaN.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from lorascope.updates.linalg import (
    GRAM_LIMIT,
    all_finite,
    as_float64,
    effective_rank,
    energy_rank,
    entropy_rank,
    gram,
    numerical_rank,
    one_thread,
    participation_rank,
    phi,
    phi_matrix,
    principal_angles,
    projected_norm,
    stable_rank,
    subspace_similarity,
    tiles,
    triangles,
)
from lorascope.updates.neuron_angles import NeuronChange, factored_change, neuron_change, neuron_cosine

__all__ = [
    "Dense",
    "LowRank",
    "NeuronChange",
    "Pair",
    "effective_rank",
    "energy_rank",
    "entropy_rank",
    "factored_change",
    "neuron_change",
    "neuron_cosine",
    "norms",
    "participation_rank",
    "phi",
    "phi_matrix",
    "principal_angles",
    "projected_norm",
    "spectra",
    "stable_rank",
    "subspace_similarity",
    "weight_norm",
]


class _Update:
    """Common methods of ``LowRank`` and ``Dense``."""

    def norm(self) -> float:
        """Compute the Frobenius norm."""
        raise NotImplementedError

    def singular_values(self) -> Float[np.ndarray, "k"]:
        """Compute the singular values, largest first."""
        raise NotImplementedError

    def svd(self) -> tuple[Float[np.ndarray, "out k"], Float[np.ndarray, "k"], Float[np.ndarray, "in k"]]:
        """Compute U, sigma and V with dW = U diag(sigma) V^T, without components with sigma = 0 up to rounding."""
        raise NotImplementedError

    def left(self, k: int | None = None) -> Float[np.ndarray, "out k"]:
        """Return the first k left singular vectors as columns, or all of them if k is None."""
        return self.svd()[0][:, :k]

    def right(self, k: int | None = None) -> Float[np.ndarray, "in k"]:
        """Return the first k right singular vectors as columns, or all of them if k is None."""
        return self.svd()[2][:, :k]

    def stable_rank(self) -> float:
        """Compute the stable rank, ``|dW|_F^2 / sigma_1^2``."""
        return stable_rank(self.singular_values())

    def effective_rank(self) -> float:
        """Compute the effective rank, exp of the entropy of sigma / sum(sigma)."""
        return effective_rank(self.singular_values())


@dataclass(frozen=True, eq=False)
class LowRank(_Update):
    """The update scale * B @ A.

    Parameters
    ----------
    B : array (out, rank)
    A : array (rank, in)
    scale : float
    exact : bool
        False if the update depends on the input and the product represents it at fixed gates.
    """

    B: Float[np.ndarray, "out rank"]
    A: Float[np.ndarray, "rank in"]
    scale: float = 1.0
    exact: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of components, including zero ones."""
        return self.B.shape[1]

    def norm(self) -> float:
        """Compute the Frobenius norm in O(rank^2 (out + in))."""
        return float(norms([self])[0])

    def singular_values(self) -> Float[np.ndarray, "k"]:
        """Compute the min(out, in, rank) singular values, largest first."""
        return spectra([self])[0]

    def svd(self) -> tuple[Float[np.ndarray, "out k"], Float[np.ndarray, "k"], Float[np.ndarray, "in k"]]:
        """Compute the singular value decomposition by QR of both factors."""
        if not all_finite(self.B, self.A):
            raise ValueError("cannot compute singular vectors: B or A contains NaN or infinity")
        with one_thread():
            Q_left, R_left = np.linalg.qr(as_float64(self.B))
            Q_right, R_right = np.linalg.qr(as_float64(self.A).T)
            U, sigma, V = np.linalg.svd(self.scale * (R_left @ R_right.T), full_matrices=False)
        k = numerical_rank(sigma, self.shape)
        return Q_left @ U[:, :k], sigma[:k], Q_right @ V[:k].T

    def dense(self) -> Float[np.ndarray, "out in"]:
        """Compute the update as a matrix."""
        return self.scale * (as_float64(self.B) @ as_float64(self.A))

    def __sub__(self, other: LowRank | Dense) -> LowRank | Dense:
        """Return the difference; for two low-rank updates it is low-rank, with the sum of their ranks.

        If their ranks are equal, it is formed from the changes of the factors, as for two states of one adapter:
        B A - B' A' = (B - B') A + B' (A - A'). The difference of two large products would lose its digits.
        """
        if isinstance(other, Dense):
            return Dense(self.dense() - other.matrix)
        B, B_other = self.scale * as_float64(self.B), other.scale * as_float64(other.B)
        A, A_other = as_float64(self.A), as_float64(other.A)
        exact = self.exact and other.exact
        if self.rank == other.rank:
            return LowRank(np.hstack([B - B_other, B_other]), np.vstack([A, A - A_other]), exact=exact)
        return LowRank(np.hstack([B, -B_other]), np.vstack([A, A_other]), exact=exact)


@dataclass(frozen=True, eq=False)
class Dense(_Update):
    """An update given as a matrix.

    Parameters
    ----------
    matrix : array (out, in)
    """

    matrix: Float[np.ndarray, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> int:
        """Largest possible rank, min(out, in)."""
        return min(self.shape)

    def norm(self) -> float:
        """Compute the Frobenius norm."""
        return float(np.sqrt(sum(np.vdot(tile, tile) for tile in tiles(self.matrix))))

    def singular_values(self) -> Float[np.ndarray, "k"]:
        """Compute the min(out, in) singular values, largest first.

        They are roots of the eigenvalues of the smaller Gram matrix: values below 1e-8 of the largest are rounding
        errors.
        """
        if not all_finite(self.matrix):
            return np.full(self.rank, np.nan)
        tall = self.matrix if self.shape[0] >= self.shape[1] else self.matrix.T
        inner = gram(tall)
        with one_thread():
            eigenvalues = np.linalg.eigvalsh(inner)
        return np.sqrt(np.maximum(eigenvalues[::-1], 0.0))

    def svd(self) -> tuple[Float[np.ndarray, "out k"], Float[np.ndarray, "k"], Float[np.ndarray, "in k"]]:
        """Compute the singular value decomposition of the matrix in O(out in min(out, in))."""
        if not all_finite(self.matrix):
            raise ValueError("cannot compute singular vectors: the matrix contains NaN or infinity")
        U, sigma, V = np.linalg.svd(as_float64(self.matrix), full_matrices=False)
        k = numerical_rank(sigma, self.shape)
        return U[:, :k], sigma[:k], V[:k].T

    def dense(self) -> Float[np.ndarray, "out in"]:
        """Return the matrix in float64."""
        return as_float64(self.matrix)

    def __sub__(self, other: LowRank | Dense) -> Dense:
        """Return the difference as a matrix."""
        return Dense(self.dense() - other.dense())


def norms(updates: Sequence[LowRank | Dense]) -> Float[np.ndarray, "n"]:
    """Compute the Frobenius norms of many updates.

    For factors, ``|B A|_F^2 = sum((B^T B) * (A A^T))``, elementwise. That sum loses digits if components cancel, as in
    the difference of two updates of different ranks. In this case the norm of R_B R_A^T is used, with the triangular
    factors of B and A^T.
    """
    return np.array([_factored_norm(update) if isinstance(update, LowRank) else update.norm() for update in updates])


def _rescale_factors(update: LowRank) -> tuple[LowRank, int]:
    """Return the update with factors whose products fit in float64, and the power of two to multiply it by."""
    # Products of narrower dtypes always fit in float64.
    largest = [max(X.max(initial=0), -X.min(initial=0)) if X.dtype == np.float64 else 1 for X in (update.B, update.A)]
    b, a = (0 if size == 0 or 2.0**-200 < size < 2.0**200 else int(np.frexp(size)[1]) for size in largest)
    return (replace(update, B=np.ldexp(update.B, -b), A=np.ldexp(update.A, -a)) if b or a else update), b + a


def _factored_norm(update: LowRank) -> float:
    if not all_finite(update.B, update.A):
        return np.nan
    update, power = _rescale_factors(update)
    left, right = gram(update.B), gram(update.A.T)
    squared = np.vdot(left, right)
    # The sum of the components' norms is an upper bound of |B A|, and far above it if components cancel.
    together = np.sum(np.sqrt(np.diagonal(left) * np.diagonal(right)))
    if squared >= GRAM_LIMIT * together**2:
        product = np.sqrt(squared)
    else:
        with one_thread():
            product = np.linalg.norm(_cores([update]))
    with np.errstate(over="ignore"):
        return float(np.ldexp(abs(update.scale) * product, power))


def spectra(updates: Sequence[LowRank | Dense]) -> list[Float[np.ndarray, "k"]]:
    """Compute the singular values of many updates, largest first; low-rank updates of one rank share a batch.

    The singular values of B A equal those of R_B R_A^T, with B = Q_B R_B and A^T = Q_A R_A. They agree with a QR
    decomposition to a relative 1e-8 if they exceed 1e-6 of the largest.
    """
    values: list[np.ndarray] = [np.empty(0)] * len(updates)
    batches = defaultdict(list)
    for i, update in enumerate(updates):
        if isinstance(update, Dense):
            values[i] = update.singular_values()
        elif not all_finite(update.B, update.A):
            values[i] = np.full(min(*update.shape, update.rank), np.nan)
        elif update.rank:
            sides = (min(side, update.rank) for side in update.shape)
            batches[(update.rank, *sides)].append((i, *_rescale_factors(update)))
    with one_thread(), np.errstate(over="ignore"):
        for batch in batches.values():
            sigmas = np.linalg.svd(_cores([update for _, update, _ in batch]), compute_uv=False)
            for (i, update, power), sigma in zip(batch, sigmas, strict=True):
                values[i] = np.ldexp(abs(update.scale) * sigma, power)
    return values


def _cores(updates: Sequence[LowRank]) -> Float[np.ndarray, "n left right"]:
    """Compute R_B R_A^T of updates of one rank: small matrices with the singular values of B A."""
    left, right = [update.B for update in updates], [update.A.T for update in updates]
    if min(left[0].shape) == min(right[0].shape):  # both sides in one batch
        R = triangles(left + right)
        return R[: len(left)] @ R[len(left) :].swapaxes(1, 2)
    return triangles(left) @ triangles(right).swapaxes(1, 2)


def weight_norm(W0: Float[np.ndarray, "out in"], update: LowRank | Dense) -> float:
    """Compute ``|W_0 + dW|_F`` without multiplying the factors of a low-rank update."""
    if isinstance(update, Dense):
        return Dense(update.dense() + W0).norm()
    inner = float(update.scale * np.vdot(as_float64(update.B).T @ as_float64(W0), as_float64(update.A)))
    return max(Dense(W0).norm() ** 2 + 2.0 * inner + update.norm() ** 2, 0.0) ** 0.5


@dataclass(frozen=True, eq=False)
class Pair:
    """A weight before and after training.

    Parameters
    ----------
    W0, W : arrays (out, in)
    """

    W0: Float[np.ndarray, "out in"]
    W: Float[np.ndarray, "out in"]

    @property
    def update(self) -> Dense:
        """The update W - W_0."""
        return Dense(as_float64(self.W) - self.W0)

    def weight_norm(self) -> float:
        """Compute ``|W|_F``."""
        return Dense(self.W).norm()

    def relative_update(self) -> float:
        """Compute ``|W - W_0|_F / |W_0|_F``: 0 for a zero update, infinity for an update of a zero weight."""
        update, weight = self.update.norm(), Dense(self.W0).norm()
        if update == 0.0:
            return 0.0
        return update / weight if weight else np.inf
