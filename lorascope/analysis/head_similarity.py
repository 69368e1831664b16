"""Heads of an adapter beside each other: how much each adds, and how alike two of them are, from small matrices."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def update_inner(
    A: Float[np.ndarray, "*heads rank in"], B: Float[np.ndarray, "heads out rank"]
) -> Float[np.ndarray, "heads heads"]:
    """Inner products <B_i A_i, B_j A_j> of all pairs, without a matrix of their size: tr(B_i^T B_j A_j A_i^T).

    Parameters
    ----------
    A : array (rank, in) or (heads, rank, in)
        One for all heads, or one each.
    B : array (heads, out, rank)

    Returns
    -------
    array (heads, heads)
        On the diagonal the squared Frobenius norms.
    """
    heads, out, rank = B.shape
    columns = B.transpose(0, 2, 1).reshape(-1, out).astype(np.float64)
    rows = A.reshape(-1, A.shape[-1]).astype(np.float64)
    outputs = (columns @ columns.T).reshape(heads, rank, heads, rank)
    inputs = (rows @ rows.T).reshape(len(rows) // rank, rank, -1, rank)
    return (outputs * inputs).sum((1, 3))


def cosines(inner: Float[np.ndarray, "heads heads"]) -> Float[np.ndarray, "heads heads"]:
    """Cosines from inner products; NaN where one is zero."""
    norms = np.sqrt(np.diagonal(inner))
    norms = np.where(norms > 0, norms, np.nan)
    return inner / np.outer(norms, norms)


def update_cosines(
    A: Float[np.ndarray, "*heads rank in"], B: Float[np.ndarray, "heads out rank"]
) -> Float[np.ndarray, "heads heads"]:
    """Cosine between B_i A_i and B_j A_j for all pairs; parameters as of ``update_inner``.

    Unlike the cosine of B it does not depend on how an update was factored, so that heads with an A each have one, too.
    """
    return cosines(update_inner(A, B))


def head_similarity(B: Float[np.ndarray, "heads out rank"]) -> Float[np.ndarray, "heads heads"]:
    """Cosine between every two heads B_i, taken as vectors; NaN where one is zero."""
    flat = B.reshape(len(B), -1).astype(np.float64)
    return cosines(flat @ flat.T)


def mean_of_pairs(table: Float[np.ndarray, "heads heads"]) -> float:
    """Mean over the pairs of different heads."""
    return float(table[np.triu_indices(len(table), 1)].mean())
