"""Linear algebra in float64: ranks of a spectrum, subspaces, triangular factors.

Source: LoRA (arXiv 2106.09685), section 7 and equation 4 for the subspaces.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from lorascope.array_types import Bool, Float

TILE_BYTES = 1 << 19  # float64: a few tiles fit in the cache, and the loop over them costs little
_QR_ROWS = 1024
# A Gram matrix squares the condition number. If its own exceeds 1e6, its Cholesky factor loses the digits that
# ``spectra`` promises.
GRAM_LIMIT = 1e-6
_SMALLEST_SQUARE = 1e-290  # smaller ones lose digits, and so do their products
GRAM_VALUES = 1 << 15  # of a tile: several copies fit in the cache
_LEAST_COLUMNS = 8  # of a block of a Gram matrix: a narrower one takes as long
_WORKSPACE_VALUES = 1 << 19  # 4 MiB in float64
_workspace = threading.local()


def effective_rank(sigma: Float[np.ndarray, "k"]) -> float:
    """Compute the effective rank of singular values, exp of the entropy of sigma / sum(sigma)."""
    return float(_exp_entropy(_power_fractions(sigma, 1)))


def entropy_rank(sigma: Float[np.ndarray, "k"]) -> float:
    """Compute the entropy rank of singular values, exp of the entropy of sigma^2 / sum(sigma^2)."""
    return float(_exp_entropy(_power_fractions(sigma, 2)))


def participation_rank(sigma: Float[np.ndarray, "k"]) -> float:
    """Compute the participation rank of singular values, (sum sigma^2)^2 / sum sigma^4."""
    shares = _power_fractions(sigma, 2)
    return float(1.0 / np.sum(shares**2)) if shares.any() else 0.0


def energy_rank(sigma: Float[np.ndarray, "k"], share: float = 0.9) -> float:
    """Return the smallest number of singular values whose squares sum to the fraction ``share`` of all."""
    shares = np.sort(_power_fractions(sigma, 2))[::-1]
    if not shares.any() or np.isnan(shares).any():
        return float(shares.sum())  # 0 or NaN
    # Without the tolerance, share = 1 would depend on the rounding of the last partial sum.
    return float(np.searchsorted(np.cumsum(shares), share - 1e-12) + 1)


def stable_rank(sigma: Float[np.ndarray, "k"]) -> float:
    """Compute the stable rank of singular values, sum sigma^2 / max sigma^2."""
    return float(_inverse_of_largest(_power_fractions(sigma, 2)))


def stable_and_effective_ranks(sigmas: Sequence[Float[np.ndarray, "_"]]) -> list[tuple[float, float]]:
    """Compute ``stable_rank`` and ``effective_rank`` of many spectra, those of one length together."""
    ranks_by_index: dict[int, tuple[float, float]] = {}
    of_length = defaultdict(list)
    for i, sigma in enumerate(sigmas):
        of_length[len(sigma)].append(i)
    for indices in of_length.values():
        stack = np.stack([sigmas[i] for i in indices])
        ranks = np.stack([_inverse_of_largest(_power_fractions(stack, 2)), _exp_entropy(_power_fractions(stack, 1))])
        ranks_by_index |= zip(indices, map(tuple, ranks.T.tolist()), strict=True)
    return [ranks_by_index[i] for i in range(len(sigmas))]


def _power_fractions(sigma: Float[np.ndarray, "*n k"], power: int) -> Float[np.ndarray, "*n k"]:
    """Return sigma^power / sum(sigma^power): zeros for a zero spectrum, NaN if any value is not finite."""
    sigma = as_float64(sigma)
    largest = sigma.max(axis=-1, initial=0.0, keepdims=True)
    with np.errstate(invalid="ignore"):  # inf / inf is NaN, and so is then the sum
        scaled = (sigma / np.where(largest == 0.0, 1.0, largest)) ** power
        total = scaled.sum(axis=-1, keepdims=True)
        return scaled / np.where(total == 0.0, 1.0, total)


def _exp_entropy(shares: Float[np.ndarray, "*n k"]) -> np.float64 | Float[np.ndarray, "*n"]:
    """Return exp of the entropy of shares, 0 if all of them are 0."""
    logs = np.log(np.where(shares == 0.0, 1.0, shares))
    return np.exp(-(shares * logs).sum(axis=-1)) * shares.any(axis=-1)


def _inverse_of_largest(shares: Float[np.ndarray, "*n k"]) -> np.float64 | Float[np.ndarray, "*n"]:
    """Return 1 / max(shares), 0 if all of them are 0."""
    largest = shares.max(axis=-1, initial=0.0)
    # ``where`` computes both cases, so the divisor is never 0.
    return np.where(largest == 0.0, 0.0, 1.0 / np.where(largest == 0.0, 1.0, largest))


def subspace_similarity(U1: Float[np.ndarray, "d m"], U2: Float[np.ndarray, "d n"]) -> Float[np.ndarray, "m n"]:
    """Compute phi of leading columns of orthonormal matrices: [i-1, j-1] is ``|U1_i^T U2_j|_F^2 / min(i, j)``.

    Parameters
    ----------
    U1, U2 : arrays (d, m), (d, n)
        Orthonormal columns, most important first.

    Returns
    -------
    array (m, n)
        Similarity from 0 (orthogonal) to 1 (one contains the other). Random subspaces have the mean max(i, j) / d.

    Source: LoRA, equation 4.
    """
    overlap = (as_float64(U1).T @ as_float64(U2)) ** 2
    sizes = np.minimum.outer(np.arange(1, U1.shape[1] + 1), np.arange(1, U2.shape[1] + 1))
    return overlap.cumsum(axis=0).cumsum(axis=1) / sizes


def phi_matrix(A1: Float[np.ndarray, "m d"], A2: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "i j"]:
    """Compute ``subspace_similarity`` of the right singular vectors of two matrices; for B, pass the transpose."""
    return subspace_similarity(_row_space(A1), _row_space(A2))


def _row_space(A: np.ndarray) -> Float[np.ndarray, "d k"]:
    with one_thread():
        _, sigma, V = np.linalg.svd(as_float64(A), full_matrices=False)
    return V[: numerical_rank(sigma, A.shape)].T


def phi(A1: Float[np.ndarray, "m d"], A2: Float[np.ndarray, "n d"], i: int, j: int) -> float:
    """Compute the similarity of the first i right singular vectors of A1 and the first j of A2 (LoRA, equation 4).

    Raises
    ------
    ValueError
        i or j is not from 1 to the rank of its matrix.
    """
    matrix = phi_matrix(A1, A2)
    if not (1 <= i <= matrix.shape[0] and 1 <= j <= matrix.shape[1]):
        raise ValueError(f"i must be from 1 to {matrix.shape[0]} and j from 1 to {matrix.shape[1]}, got {i} and {j}")
    return float(matrix[i - 1, j - 1])


def principal_angles(U1: Float[np.ndarray, "d m"], U2: Float[np.ndarray, "d n"]) -> Float[np.ndarray, "k"]:
    """Compute the min(m, n) angles in radians between the spans of orthonormal columns, smallest first.

    Cosines do not resolve angles below 1e-8, nor do sines resolve angles near 90 degrees. Angles below 45 degrees are
    computed from their sines, larger ones from their cosines.
    """
    large, small = as_float64(U1), as_float64(U2)
    if large.shape[1] < small.shape[1]:
        large, small = small, large
    inner = large.T @ small
    cosines = np.linalg.svd(inner, compute_uv=False)
    # The largest cosine belongs to the smallest sine.
    sines = np.linalg.svd(small - large @ inner, compute_uv=False)[::-1]
    return np.where(cosines > np.sqrt(0.5), np.arcsin(np.minimum(sines, 1.0)), np.arccos(np.minimum(cosines, 1.0)))


def projected_norm(
    W: Float[np.ndarray, "out in"], U: Float[np.ndarray, "out m"], V: Float[np.ndarray, "in n"]
) -> float:
    """Compute ``|U^T W V|_F``, the norm of W projected on the given subspaces (LoRA, table 7).

    For U and V from an update dW, ``|dW|_F`` divided by this is the amplification factor.
    """
    return float(np.linalg.norm(as_float64(U).T @ as_float64(W) @ as_float64(V)))


def triangles(factors: Sequence[Any], buffer: np.ndarray | None = None) -> Float[np.ndarray, "n small rank"]:
    """Compute R of X = Q R for matrices X (side, rank) by Cholesky of the Gram matrix or QR; small = min(side, rank).

    R of an array with NaN or infinity contains NaN. See ``tiles`` for other arrays than those of numpy and ``buffer``.
    """
    rank, small = factors[0].shape[1], min(factors[0].shape)
    result = np.empty((len(factors), small, rank))
    sound = np.zeros(len(factors), dtype=bool)
    if small == rank:  # otherwise the Gram matrix is singular
        grams = _grams(factors, buffer)
        squares = grams.diagonal(axis1=1, axis2=2)
        sound = np.asarray(((squares > _SMALLEST_SQUARE) & (squares < np.inf)).all(axis=1))
        # Rounding errors of a Gram matrix are relative to the norms of its columns, so their scale does not matter.
        sizes = np.sqrt(squares[sound])[:, None, :]
        cosines = grams[sound] / (sizes * sizes.swapaxes(1, 2))
        accurate = _are_well_conditioned(cosines)
        sound[sound] = accurate
        result[sound] = np.linalg.cholesky(cosines[accurate], upper=True) * sizes[accurate]
    for i, factor in enumerate(factors):
        if not sound[i]:
            result[i] = _qr_triangle(as_float64(factor))
    return result


def _are_well_conditioned(cosines: Float[np.ndarray, "n rank rank"]) -> Bool[np.ndarray, "n"]:
    """Return which matrices with a diagonal of ones have a condition below that of ``GRAM_LIMIT``."""
    rank = cosines.shape[-1]
    try:
        # It succeeds only if all eigenvalues exceed what is subtracted, and the largest is at most the rank. The first
        # call of eigvalsh after a training step takes ten times as long.
        np.linalg.cholesky(cosines - GRAM_LIMIT * rank * np.eye(rank))
        return np.ones(len(cosines), dtype=bool)
    except np.linalg.LinAlgError:
        eigenvalues = np.linalg.eigvalsh(cosines)
        return np.asarray(eigenvalues[:, 0] > GRAM_LIMIT * eigenvalues[:, -1])


def _qr_triangle(X: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute R of X = Q R, in blocks of rows first: QR reads a tall array from memory once per column."""
    full_rows = len(X) // _QR_ROWS * _QR_ROWS
    if full_rows > _QR_ROWS:
        blocks: Any = np.linalg.qr(X[:full_rows].reshape(-1, _QR_ROWS, X.shape[1]), mode="r")
        X = np.vstack([blocks.reshape(-1, X.shape[1]), X[full_rows:]])
    return np.asarray(np.linalg.qr(X, mode="r"))


def stacks(*groups: Sequence[np.ndarray]) -> list[Float[np.ndarray, "_ ..."]]:
    """Stack the matrices of each group, of one shape, in float64; the next call in this thread overwrites them.

    All calls use the same memory unless it is too small: the system clears fresh memory page by page, which takes
    longer than a sum over it.
    """
    sizes = [len(group) * group[0].size for group in groups]
    if sum(sizes) > _WORKSPACE_VALUES:
        return [np.stack(group, dtype=np.float64) for group in groups]
    if not hasattr(_workspace, "values"):
        _workspace.values = np.empty(_WORKSPACE_VALUES)
    stacked = []
    for group, memory in zip(groups, np.split(_workspace.values[: sum(sizes)], np.cumsum(sizes[:-1])), strict=True):
        stacked.append(np.stack(group, out=memory.reshape(len(group), *group[0].shape)))
    return stacked


def as_float64(array: Any) -> NDArray[np.float64]:
    """Return an array or a tensor as a float64 array for linear algebra, without a copy if it already is one."""
    if not isinstance(array, np.ndarray) and hasattr(array, "detach"):
        array = array.detach().double().cpu().numpy()
    return np.asarray(array, dtype=np.float64)


def beside(tensor: Any, array: Any) -> Any:
    """Return an array as a tensor for linear algebra on the device of ``tensor``."""
    # Because a tensor exists, torch is loaded; an import at the top would require it.
    return sys.modules["torch"].as_tensor(array, device=tensor.device)


def at_least_float32(tensor: Any) -> Any:
    """Return a tensor for linear algebra in float32, or in float64 if it already is."""
    return tensor if tensor.element_size() >= 8 else tensor.float()


def product_inner(W: Any, B: Any, A: Any) -> Any:
    """Compute the inner product <W, B A> of matrices on one device in float64, without the product B A."""
    B, A = at_least_float32(B), at_least_float32(A)
    dtype = max((W, B, A), key=lambda X: X.element_size()).dtype
    W, B, A = W.to(dtype), B.to(dtype), A.to(dtype)
    # The smaller of both products takes less time, and A W^T and B^T W take less than W A^T and W^T B.
    if W.shape[0] < W.shape[1]:
        return ((A @ W.T).double() * B.T).sum()
    return ((B.T @ W).double() * A).sum()


def all_finite(*arrays: np.ndarray) -> bool:
    """Return whether all entries of vectors and matrices are finite."""
    return all(np.isfinite(array).all() for array in arrays)


def gram(tall: Any, buffer: np.ndarray | None = None) -> Float[np.ndarray, "rank rank"]:
    """Compute the Gram matrix X^T X in float64, in tiles that stay in the cache; see ``tiles`` for X and ``buffer``."""
    rank = tall.shape[1]
    result = np.zeros((rank, rank))
    for tile in tiles(tall, _tile_rows(rank), buffer):
        result += _tile_gram(tile)
    return result


def _grams(factors: Sequence[Any], buffer: np.ndarray | None) -> Float[np.ndarray, "n rank rank"]:
    """Compute ``gram`` of many arrays of one rank, with equal results: those that are single tiles together."""
    rank = factors[0].shape[1]
    result = np.empty((len(factors), rank, rank))
    together = defaultdict(list)
    for i, factor in enumerate(factors):
        if isinstance(factor, np.ndarray) and len(factor) <= _tile_rows(rank):
            # The order of memory is kept: copies into another one are slow, and products may be rounded differently.
            together[len(factor), factor.strides[0] < factor.strides[1]].append(i)
        else:
            result[i] = gram(factor, buffer)
    for (_, by_column), indices in together.items():
        arrays = [factors[i] for i in indices]
        if by_column:
            (stack,) = stacks([array.T for array in arrays])
            stack = stack.swapaxes(1, 2)
        else:
            (stack,) = stacks(arrays)
        result[indices] = _tile_gram(stack)
    return result


def _tile_rows(rank: int) -> int:
    return max(rank, GRAM_VALUES // max(1, rank))


def _tile_gram(tile: Float[np.ndarray, "*n rows rank"]) -> Float[np.ndarray, "*n rank rank"]:
    rank = tile.shape[-1]
    width = max(_LEAST_COLUMNS, -(-rank // 4))
    # BLAS multiplies narrow blocks of columns faster than it computes X^T X, which numpy would ask of it for the last
    # block without one more row. Blocks above the diagonal are copied.
    blocks = [(slice(max(0, first - 1), None), slice(first, first + width)) for first in range(0, rank, width)]
    result = np.empty((*tile.shape[:-2], rank, rank))
    for rows, columns in blocks:
        result[..., rows, columns] = tile.swapaxes(-1, -2)[..., rows, :] @ tile[..., columns]
    for rows, columns in blocks:
        result[..., columns, rows] = result[..., rows, columns].swapaxes(-1, -2)
    return result


def tiles(
    matrix: Any, rows: int | None = None, buffer: np.ndarray | None = None
) -> Iterator[Float[np.ndarray, "tile columns"]]:
    """Yield blocks of rows of a matrix in float64; the next one may overwrite a block.

    Parameters
    ----------
    matrix : array (height, columns)
        An array, a tensor, or stored values with ``shape``, ``dtype``, ``strides`` and slices that have ``read_into``.
    rows : int, optional
        Rows of a block, by default as many as fit in the cache.
    buffer : array of float64, optional
        Memory for 2 blocks: many calls with the same one touch fewer pages.
    """
    height, columns = matrix.shape
    rows = max(1, min(height, rows or TILE_BYTES // (8 * max(1, columns))))
    if matrix.dtype == np.float64 or hasattr(matrix, "detach"):
        for start in range(0, height, rows):
            yield as_float64(matrix[start : start + rows])
        return
    size = rows * columns
    if buffer is None or len(buffer) < 2 * size:
        buffer = np.empty(2 * size)
    wide, narrow = buffer[:size], buffer[size:].view(np.float32)[:size]
    if matrix.strides[0] >= matrix.strides[1]:  # in the order of the matrix in memory
        wide, narrow = wide.reshape(rows, columns), narrow.reshape(rows, columns)
    else:
        wide, narrow = wide.reshape(columns, rows).T, narrow.reshape(columns, rows).T
    for start in range(0, height, rows):
        block = matrix[start : start + rows]
        count = block.shape[0]
        if not isinstance(block, np.ndarray):
            block.read_into(narrow[:count])
            block = narrow[:count]
        np.copyto(wide[:count], block)
        yield wide[:count]


def numerical_rank(sigma: np.ndarray, shape: tuple[int, ...]) -> int:
    """Count the singular values that exceed the rounding error of zero."""
    tolerance = max(shape) * np.finfo(np.float64).eps * np.max(sigma, initial=0.0)
    return int(np.count_nonzero(sigma > tolerance))


@cache
def _pool() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> AbstractContextManager:
    """Limit BLAS, for linear algebra, to one thread: threads mostly wait for each other in small factorizations."""
    return _pool().limit(limits=1, user_api="blas")
