"""Updates as a product of two low-rank factors, which are multiplied only if a matrix is requested.

The factors are stored, or computed from stored ones: several experts (``Mixture``), or the changes of both factors
(``Residual``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np

from lorascope.array_types import Float
from lorascope.updates.linalg import (
    GRAM_LIMIT,
    GRAM_VALUES,
    all_finite,
    as_float64,
    beside,
    gram,
    numerical_rank,
    one_thread,
    product_inner,
    stacks,
    triangles,
)
from lorascope.updates.neuron_angles import NeuronChange, factored_change
from lorascope.updates.weight_update import Shapes, Update

_BATCH_VALUES = 1 << 18  # of updates that are computed together: 2 MiB in float64
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LowRank(Update, form="low_rank"):
    """Low-rank update scale * B @ A.

    Parameters
    ----------
    B : array (out, rank)
    A : array (rank, in)
    scale : float
    exact : bool
        False if the update depends on the input and the product represents it at fixed gates.
    stored : mapping name -> array, optional
        Arrays that snapshots store, if A and B are computed from them.
    """

    B: Float[np.ndarray, "out rank"]
    A: Float[np.ndarray, "rank in"]
    scale: float = 1.0
    exact: bool = True
    stored: Mapping[str, Any] | None = None
    required = frozenset({"A", "B"})

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of components, including zero ones."""
        return self.B.shape[1]

    @property
    def low_rank(self) -> LowRank:
        """The update itself."""
        return self

    def to_factors(self) -> dict[str, Any]:
        """Return A (rank, in) and B (out, rank), or the arrays that they are computed from."""
        return {"A": self.A, "B": self.B} if self.stored is None else dict(self.stored)

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> LowRank:
        """Build an update from A (rank, in), B (out, rank) and optionally ``diagonal`` (rank,).

        The update is ``scale * B @ diag(diagonal) @ A``.
        """
        B = factors["B"]
        if "diagonal" in factors:
            with np.errstate(over="ignore", invalid="ignore"):  # an infinite factor results in an infinite norm
                B = B * factors["diagonal"]
        return LowRank(B, factors["A"], scale, exact)

    @classmethod
    def fits(cls, shapes: Shapes, floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]) -> bool:
        """See `Update.fits`."""
        match shapes:
            case {"A": (rank, _), "B": (_, width), **rest} if "gates" not in rest:
                return rank == width and rest.get("diagonal", (rank,)) == (rank,) and floats["A"] and floats["B"]
        return False

    def norm(self) -> float:
        """Compute the Frobenius norm in O(rank^2 (out + in)).

        ``|B A|_F^2 = sum((B^T B) * (A A^T))``, elementwise. That sum loses digits if components cancel, as in the
        difference of two updates of different ranks. In this case the norm of R_B R_A^T is used, with the triangular
        factors of B and A^T.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            update, power = _rescale_factors(self)
            left, right = gram(update.B), gram(update.A.T)
            squared = np.vdot(left, right)
            # The sum of the components' norms is an upper bound of |B A|, and far above it if components cancel.
            together = np.sum(np.sqrt(np.diagonal(left) * np.diagonal(right)))
        if not np.isfinite(together):
            return np.nan
        if squared >= GRAM_LIMIT * together**2:
            product = np.sqrt(squared)
        else:
            with one_thread():
                product = np.linalg.norm(_cores([update])[0])
        with np.errstate(over="ignore"):
            return float(np.ldexp(abs(update.scale) * product, power))

    def inner(self, other: Update) -> float:
        """Compute <dW_1, dW_2>; two products need only the small Gram matrices of their factors."""
        if other.low_rank is None:
            return self.inner_weight(other.dense())
        B, A, scale = other.low_rank.B, other.low_rank.A, other.low_rank.scale
        left, right = as_float64(self.B).T @ as_float64(B), as_float64(self.A) @ as_float64(A).T
        return float(self.scale * scale * np.vdot(left, right))

    def inner_weight(self, W: Any) -> float:
        """Compute <W, dW> without multiplying the factors; on the device of W, if it is a tensor."""
        # <W, B A> = <B^T W, A>
        if isinstance(W, np.ndarray):
            return float(self.scale * np.vdot(as_float64(self.B).T @ as_float64(W), as_float64(self.A)))
        return float(self.scale * product_inner(W, beside(W, self.B), beside(W, self.A)))

    def neuron_change(self, W0: Float[np.ndarray, "out in"], axis: int) -> NeuronChange:
        """Compute ``neuron_angles.neuron_change`` without multiplying the factors."""
        return factored_change(W0, self.scale * as_float64(self.B), self.A, axis)

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
        k = numerical_rank(sigma, self.shape)  # the other singular vectors are arbitrary
        return Q_left @ U[:, :k], sigma[:k], Q_right @ V[:k].T

    def dense(self) -> Any:
        """Compute the update as a matrix: an array in float64, or a tensor in the dtype of the factors."""
        if isinstance(self.B, np.ndarray):
            return self.scale * (as_float64(self.B) @ as_float64(self.A))
        return self.scale * (self.B @ self.A)

    def __sub__(self, other: Update) -> Update:
        """Return the difference; for two low-rank updates it is low-rank, with the sum of their ranks.

        If their ranks are equal, it is formed from the changes of the factors, as for two states of one adapter:
        B A - B' A' = (B - B') A + B' (A - A'). The difference of two large products would lose its digits.
        """
        if (product := other.low_rank) is None:
            return super().__sub__(other)
        B, B_other = self.scale * as_float64(self.B), product.scale * as_float64(product.B)
        A, A_other = as_float64(self.A), as_float64(product.A)
        exact = self.exact and other.exact
        if self.rank == product.rank:
            return LowRank(np.hstack([B - B_other, B_other]), np.vstack([A, A - A_other]), exact=exact)
        return LowRank(np.hstack([B, -B_other]), np.vstack([A, A_other]), exact=exact)


class Residual(LowRank, form="residual"):
    """Low-rank update scale * (B @ A - B_0 @ A_0), of twice the rank, if factors start at B_0, A_0 (PiSSA, OLoRA)."""

    required = frozenset({"A", "B", "A0", "B0"})
    constants = frozenset({"A0", "B0"})

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Residual:
        """Build an update from A, A0 (rank, in) and B, B0 (out, rank)."""
        stored = {name: factors[name] for name in ("A", "B", "A0", "B0")}
        # (B - B_0) A + B_0 (A - A_0) is exactly zero at the start; the difference of two products is a rounding error.
        A, B, A0, B0 = map(as_float64, stored.values())
        return cls(np.hstack([B - B0, B0]), np.vstack([A, A - A0]), scale, stored=stored)

    @classmethod
    def fits(cls, shapes: Shapes, floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]) -> bool:
        """See `Update.fits`."""
        match shapes:
            case {"A": (rank, _) as A, "B": (_, width) as B, "A0": A0, "B0": B0}:
                return rank == width and (A0, B0) == (A, B) and all(floats.values())
        return False


class Mixture(LowRank, form="mixture"):
    """Low-rank update scale * sum(gates[i] * B_i @ A_i) of several experts, at fixed gates."""

    required = frozenset({"A", "B", "gates"})
    constants = frozenset({"gates"})

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Mixture:
        """Build an update from B (heads, out, rank), ``gates`` (heads,) and A (rank, in) or (heads, rank, in)."""
        stored = {name: factors[name] for name in ("A", "B", "gates")}
        A, B, gates = stored.values()
        # If all experts share A, the sum has the rank of one expert.
        if A.ndim == 2:
            return cls(np.tensordot(gates, B, 1), A, scale, exact, stored)
        return cls(np.hstack(list(gates[:, None, None] * B)), A.reshape(-1, A.shape[-1]), scale, exact, stored)

    @classmethod
    def fits(cls, shapes: Shapes, floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]) -> bool:
        """See `Update.fits`."""
        match shapes:
            case {"gates": (heads,), "A": (*number, rank, _), "B": (count, _, width)}:
                return heads == count > 0 and rank == width and number in ([], [heads]) and all(floats.values())
        return False


class Product(NamedTuple):
    """Low-rank product scale * B @ A of stored factors; see `linalg.tiles`."""

    B: Any
    A: Any
    scale: float


def spectra(updates: Iterable[Update | Product]) -> list[Float[np.ndarray, "k"]]:
    """Compute the singular values of many updates, low-rank or not, largest first.

    The singular values of B A equal those of R_B R_A^T, with B = Q_B R_B and A^T = Q_A R_A. They agree with a QR
    decomposition to a relative 1e-8 if they exceed 1e-6 of the largest. Large updates are read one at a time, and small
    ones of one shape are decomposed together.
    """
    values: dict[int, np.ndarray] = {}  # by index, because batches end in another order
    cores = defaultdict(list)
    buffer = np.empty(2 * GRAM_VALUES)

    def products() -> Iterator[tuple[Any, int, tuple[int, Product, int]]]:
        for i, update in enumerate(updates):
            if not isinstance(update, LowRank | Product):
                values[i] = update.singular_values()
            elif not update.B.shape[1]:
                values[i] = np.empty(0)
            else:
                size = (update.B.shape[0] + update.A.shape[1]) * update.B.shape[1]
                yield (update.B.shape, update.A.shape), size, (i, *_rescale_factors(update))

    with one_thread(), np.errstate(over="ignore", invalid="ignore"):
        for batch in batches(products()):
            for (i, update, power), core in zip(batch, _cores([update for _, update, _ in batch], buffer), strict=True):
                if np.isfinite(core).all():
                    cores[core.shape].append((i, core, abs(update.scale), power))
                else:
                    values[i] = np.full(min(*update.B.shape, update.A.shape[1]), np.nan)
        for stack in cores.values():
            sigmas = np.linalg.svd(np.stack([core for _, core, *_ in stack]), compute_uv=False)
            for (i, _, scale, power), sigma in zip(stack, sigmas, strict=True):
                values[i] = np.ldexp(scale * sigma, power)
    return [values[i] for i in range(len(values))]


def change_norms(pairs: Iterable[tuple[Update, Update]]) -> list[float]:
    """Compute ``|after - before|_F`` for many pairs (after, before) of low-rank and other updates.

    Two states of a product with factors in float32 are compared in batches of one shape, other updates one at a time.
    """
    norms: dict[int, float] = {}

    def products() -> Iterator[tuple[Any, int, tuple[int, LowRank, LowRank]]]:
        for i, (after, before) in enumerate(pairs):
            # Factors in float64 may have to be rescaled first, which ``norm`` does.
            if (
                _has_narrow_factors(after)
                and _has_narrow_factors(before)
                and (after.rank, after.scale) == (before.rank, before.scale)
            ):
                yield (after.B.shape, after.A.shape), 2 * (after.B.size + after.A.size), (i, after, before)
            else:
                norms[i] = (after - before).norm()

    for batch in batches(products()):
        for (i, after, before), norm in zip(batch, _change_norms_of_one_shape(batch), strict=True):
            norms[i] = (after - before).norm() if np.isnan(norm) else float(norm)
    return [norms[i] for i in range(len(norms))]


def count_used(product: LowRank) -> int:
    """Return the number of components of a low-rank update of which neither factor is zero."""
    return int(np.count_nonzero(product.A.any(axis=1) & product.B.any(axis=0)))


def batches(products: Iterable[tuple[Any, int, T]]) -> Iterator[list[T]]:
    """Yield lists of low-rank products of one shape, one if it is large, from tuples (shape, values, product)."""
    waiting = defaultdict(list)
    for shape, size, product in products:
        waiting[shape].append(product)
        if size * len(waiting[shape]) > _BATCH_VALUES:
            yield waiting.pop(shape)
    yield from waiting.values()


def _has_narrow_factors(update: Update) -> TypeGuard[LowRank]:
    return isinstance(update, LowRank) and update.B.dtype == update.A.dtype == np.float32


def _change_norms_of_one_shape(batch: Sequence[tuple[int, LowRank, LowRank]]) -> Float[np.ndarray, "pairs"]:
    """Compute the norms of B A - B_0 A_0 = dB A + B_0 dA, NaN where `LowRank.norm` is more accurate."""
    _, now, before = zip(*batch, strict=True)
    initial = [update.B for update in before], [update.A for update in before]
    B, A, B0, A0 = stacks([update.B for update in now], [update.A for update in now], *initial)
    with np.errstate(over="ignore", invalid="ignore"), one_thread():
        dB, dA = np.subtract(B, B0, out=B).swapaxes(1, 2), np.subtract(A, A0, out=A0).swapaxes(1, 2)
        first, last = (dB @ B, A @ A.swapaxes(1, 2)), (B0.swapaxes(1, 2) @ B0, dA.swapaxes(1, 2) @ dA)
        squares = np.sum(first[0] * first[1] + last[0] * last[1] + 2 * (dB @ B0) * (A @ dA), (1, 2))
        sizes = (np.diagonal(left, 0, 1, 2) * np.diagonal(right, 0, 1, 2) for left, right in (first, last))
        together = sum(np.sum(np.sqrt(size), 1) for size in sizes)
        scales = np.abs([update.scale for update in now])
        return np.where(squares >= GRAM_LIMIT * together**2, scales * np.sqrt(squares), np.nan)


def _rescale_factors(update: LowRank | Product) -> tuple[Product, int]:
    """Return factors whose products fit in float64, and the power of two to multiply their product by."""
    (B, b), (A, a) = _rescale(update.B), _rescale(update.A)
    return Product(B, A, update.scale), b + a


def _rescale(X: Any) -> tuple[Any, int]:
    """Divide a factor by a power of two, which is also returned, if products of its values may not fit in float64."""
    if X.dtype != np.float64:  # products of narrower dtypes always fit
        return X, 0
    values = np.asarray(X)
    if 2.0**-400 * values.size < np.vdot(values, values) < 2.0**400:  # the largest is between 2^-200 and 2^200
        return X, 0
    size = max(np.max(values, initial=0), -np.min(values, initial=0))
    if size == 0 or 2.0**-200 < size < 2.0**200:
        return X, 0
    power = int(np.frexp(size)[1])
    return np.ldexp(X, -power), power


def _cores(
    updates: Sequence[LowRank | Product], buffer: np.ndarray | None = None
) -> Float[np.ndarray, "updates left right"]:
    """Compute R_B R_A^T for updates of one shape: small matrices with the singular values of B A."""
    left, right = [update.B for update in updates], [update.A.T for update in updates]
    if min(left[0].shape) == min(right[0].shape):  # both sides in one batch
        R = triangles(left + right, buffer)
        R_left, R_right = R[: len(left)], R[len(left) :]
    else:
        R_left, R_right = triangles(left, buffer), triangles(right, buffer)
    return R_left @ R_right.swapaxes(1, 2)
