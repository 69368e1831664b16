"""Norms and cosine similarities of the experts of a HydraLoRA adapter, computed from small matrices."""

from __future__ import annotations

import numpy as np

from lorascope.array_types import Float


def update_inner(
    A: Float[np.ndarray, "*heads rank in"], B: Float[np.ndarray, "heads out rank"]
) -> Float[np.ndarray, "heads heads"]:
    """Compute the inner products <B_i A_i, B_j A_j> of all pairs of heads (experts) as tr(B_i^T B_j A_j A_i^T).

    No matrix of shape (out, in) is formed. A is shared (rank, in), or separate (heads, rank, in). The diagonal of the
    result contains the squared Frobenius norms. Unlike those of B, their cosines do not depend on the factorization.
    """
    heads, out, rank = B.shape
    columns = B.transpose(0, 2, 1).reshape(-1, out).astype(np.float64)
    rows = A.reshape(-1, A.shape[-1]).astype(np.float64)
    # A shared A has a single expert axis of size 1, which broadcasts over all pairs in the last product.
    outputs = (columns @ columns.T).reshape(heads, rank, heads, rank)
    inputs = (rows @ rows.T).reshape(len(rows) // rank, rank, -1, rank)
    return (outputs * inputs).sum((1, 3))


def cosines(inner: Float[np.ndarray, "heads heads"]) -> Float[np.ndarray, "heads heads"]:
    """Compute the cosine similarity of heads (experts) from inner products; NaN for pairs with a zero vector."""
    norms = np.sqrt(np.where(np.diagonal(inner) > 0, np.diagonal(inner), np.nan))
    return inner / np.outer(norms, norms)


def head_similarity(B: Float[np.ndarray, "heads out rank"]) -> Float[np.ndarray, "heads heads"]:
    """Compute the similarity of heads: the cosine between every pair of experts' B_i as vectors; NaN if one is zero."""
    flat = B.reshape(len(B), -1).astype(np.float64)
    return cosines(flat @ flat.T)


def mean_of_pairs(table: Float[np.ndarray, "heads heads"]) -> float:
    """Return the mean similarity over pairs of different heads (experts), NaN for a single one."""
    return float(table[np.triu_indices(len(table), 1)].mean()) if len(table) > 1 else np.nan
