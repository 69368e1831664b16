"""Factors of many adapters as points: cosine similarities in three views, and 2-D embeddings (PCA, t-SNE).

(B, A) and (B R^-1, R A) are the same update for every invertible R. Training from another A_0 leads to another R. The
raw view compares the arrays as they are, as the paper's figure does, so it depends on R. The other two views do not:

canonical  A = sqrt(sigma) V^T and B = U sqrt(sigma) from the update's singular value decomposition; a component with
           zero singular value is a row of zeros; components with equal singular values are arbitrary (the space is not)
space      the row space of A or the column space of B: everything in a factor that does not depend on R

Source: HydraLoRA (arXiv 2404.19245), figure 3, for the raw view and its t-SNE.

Departs:

- Every factor is normalized before it is compared: B starts at zero, so its norm is small if little was learned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorascope.array_types import Float
from lorascope.updates import LowRank
from lorascope.updates.linalg import all_finite, as_float64, numerical_rank

Factor = Literal["A", "B"]
View = Literal["raw", "canonical", "space"]
VIEWS: tuple[View, ...] = ("raw", "canonical", "space")
Updates = Mapping[str, Mapping[str, LowRank]]

_PAPER_PERPLEXITY = 30.0  # Barnes-Hut t-SNE reads three times as many neighbors of each point
_PCA_SIZE = 50  # the usual number of input components for t-SNE; more components only slow it down


@dataclass(frozen=True, eq=False)
class FactorSet:
    """Factors to compare and embed: one point for every slot (a module's A or B) and run.

    Parameters
    ----------
    shape : tuple of int
        Common shape of the factors: (rank, width), or (width,) for spaces.
    modules, factors, runs, domains : sequence of str
        Module and factor ("A" or "B") of each slot, and name and domain of each run.
    cosine : array (slot, run, slot, run)
        Cosine between points. For spaces ``|U_1^T U_2|_F^2 / sqrt(k_1 k_2)``, the cosine of their projections.
    """

    shape: tuple[int, ...]
    modules: Sequence[str]
    factors: Sequence[str]
    runs: Sequence[str]
    domains: Sequence[str]
    cosine: Float[np.ndarray, "slot run slot run"]

    @property
    def flat(self) -> Float[np.ndarray, "point point"]:
        """Cosines between all points, in the order of ``table``."""
        points = len(self.modules) * len(self.runs)
        return self.cosine.reshape(points, points)

    def table(self) -> pd.DataFrame:
        """Return ``module, factor, run, domain``, one row per point."""
        slots = zip(self.modules, self.factors, strict=True)
        runs = list(zip(self.runs, self.domains, strict=True))
        rows = [(*slot, *run) for slot in slots for run in runs]
        return pd.DataFrame(rows, columns=["module", "factor", "run", "domain"])


def factored_updates(updates: Mapping[str, Any]) -> dict[str, LowRank]:
    """Return the updates of a run that have factors A and B to embed."""
    return {module: update.low_rank for module, update in updates.items() if update.low_rank is not None}


def common_modules(updates: Updates) -> list[str]:
    """Return the modules whose factors are embedded: those that all runs adapt, in the order of the first run."""
    first, *other_runs = updates.values()
    common = set(first).intersection(*other_runs)
    return [module for module in first if module in common]


def build_factor_sets(
    updates: Updates, domains: Mapping[str, str], factors: Sequence[Factor] = ("A", "B"), view: View = "raw"
) -> list[FactorSet]:
    """Group the factors of runs by shape, each group to embed together, and compute their cosines.

    Factors of different shapes are never compared, truncated or padded.

    Parameters
    ----------
    updates : mapping run -> module -> update
        Modules that some run does not adapt are ignored.
    domains : mapping run -> str
        Domain of the text that a run was trained on.
    factors : sequence of {"A", "B"}
        Factors to include, by default both. A and B of a square module are then in the same set.
    view : {"raw", "canonical", "space"}
        View to compare, by default "raw"; see the module docstring.

    Returns
    -------
    list of FactorSet
        One set per shape.

    Raises
    ------
    ValueError
        The runs have no adapted module in common, or a factor is zero, not finite or of another shape in another run.
    """
    runs, modules = list(updates), common_modules(updates)
    if not modules:
        raise ValueError(f"cannot compare runs {', '.join(runs)}: they have no adapted module in common")
    slots = defaultdict(list)  # by shape, because a cosine needs arrays of the same shape
    for factor in factors:
        for module in modules:
            arrays = [view_factor(updates[run][module], factor, view, f"{module} in run {run}") for run in runs]
            slots[_common_shape(arrays, view, f"{factor} of {module}")].append((module, factor, arrays))
    sets = []
    for shape, members in slots.items():
        names, kinds, by_slot = map(list, zip(*members, strict=True))
        points = list(chain.from_iterable(by_slot))
        size = (len(members), len(runs))
        cosine = (_subspace_overlaps(points) if view == "space" else _cosines(points)).reshape(*size, *size)
        sets.append(FactorSet(shape, names, kinds, runs, [domains[run] for run in runs], cosine))
    return sets


def _common_shape(arrays: Sequence[np.ndarray], view: View, name: str) -> tuple[int, ...]:
    shapes = {array.shape for array in arrays}
    widths = {width for _, width in shapes}
    if len(widths) > 1:
        text = " and ".join(map(str, sorted(widths)))
        raise ValueError(f"{name} must have the same width in all runs, got {text}: compare runs of one model")
    if view == "space":  # subspaces of different dimensions can be compared
        return (widths.pop(),)
    if len(shapes) > 1:
        text = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
        raise ValueError(
            f"{name} must have the same rank in all runs, got shapes {text}: use view='space' for different ranks"
        )
    return shapes.pop()


def _cosines(arrays: Sequence[np.ndarray]) -> Float[np.ndarray, "point point"]:
    flat = np.array(arrays, dtype=np.float64).reshape(len(arrays), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return flat @ flat.T


def _subspace_overlaps(bases: Sequence[np.ndarray]) -> Float[np.ndarray, "point point"]:
    """Compute ``|U_1^T U_2|_F^2 / sqrt(k_1 k_2)`` for every pair of bases, given as rows."""
    sizes = np.array(list(map(len, bases)))
    # One product of all bases with each other, then a sum over the block of each pair, is faster than a loop.
    stacked = np.concatenate(bases)
    first = np.cumsum(sizes) - sizes
    squares = (stacked @ stacked.T) ** 2
    sums = np.add.reduceat(np.add.reduceat(squares, first, axis=0), first, axis=1)
    return sums / np.sqrt(np.outer(sizes, sizes))


def orthonormal_basis(update: LowRank, factor: Factor) -> Float[np.ndarray, "width k"]:
    """Represent a factor to embed by orthonormal columns that span the row space of A or the column space of B.

    A singular value at the rounding level of the saved precision does not count as a direction. Rounding a factor C
    changes it by at most ``eps / 2 |C|_F`` in norm, and so each singular value. The threshold is twice that, because a
    factor may have been scaled once more. A float32 array whose lower 16 bits are all zero was saved as bfloat16.
    """
    columns = _factor_rows(update, factor).T
    eps = float(np.finfo(columns.dtype).eps)
    if columns.dtype == np.float32 and not np.any(np.ascontiguousarray(columns).view(np.uint32) & 0xFFFF):
        eps = 2.0**-7  # bfloat16
    U, sigma, _ = np.linalg.svd(as_float64(columns), full_matrices=False)
    count = np.count_nonzero(sigma > eps * np.linalg.norm(sigma))
    return U[:, : min(int(count), numerical_rank(sigma, columns.shape))]


def canonical_factor(update: LowRank, factor: Factor) -> Float[np.ndarray, "rank width"]:
    """Represent a factor to embed by the balanced factorization, one row per component; B is transposed.

    The sign of a component makes the largest entry of its left singular vector positive. If the update has less than
    its nominal rank, the missing components are rows of zeros: sqrt(0) times an arbitrary vector.
    """
    U, sigma, V = update.svd()
    rows = (np.sqrt(sigma) * _signs(U) * (V if factor == "A" else U)).T
    return np.vstack([rows, np.zeros((update.rank - len(rows), rows.shape[1]))])


def _signs(columns: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "1 k"]:
    """Return the sign of the largest entry of each column."""
    return np.sign(np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0))


def _factor_rows(update: LowRank, factor: Factor) -> Float[np.ndarray, "rank width"]:
    return update.A if factor == "A" else update.B.T


def view_factor(update: LowRank, factor: Factor, view: View, where: str) -> Float[np.ndarray, "k width"]:
    """Return the rows of a factor that a view of the embeddings compares, one per component.

    Raises
    ------
    ValueError
        The factor is zero or not finite, so it has no direction.
    """
    array = _factor_rows(update, factor)
    # The canonical rows of one factor depend on both.
    if not all_finite(array) or (view == "canonical" and not all_finite(update.A, update.B)):
        raise ValueError(f"{factor} of {where} must be finite, got NaN or infinity: exclude this run")
    if view == "space":
        array = orthonormal_basis(update, factor).T
    elif view == "canonical":
        array = canonical_factor(update, factor)
    if not array.any():
        raise ValueError(f"{factor} of {where} must be nonzero, got all zeros: train the run first")
    return array


def pca(cloud: FactorSet, size: int = 2) -> Float[np.ndarray, "point size"]:
    """Embed factors by PCA: project the points onto their first principal components, from the cosines only.

    The sign of a component makes its largest coordinate positive.
    """
    centered = cloud.flat - cloud.flat.mean(axis=0)
    centered -= centered.mean(axis=1, keepdims=True)
    # Centering rows and columns turns the cosines into inner products of centered points, as PCA needs them.
    values, vectors = np.linalg.eigh((centered + centered.T) / 2)
    vectors = vectors[:, ::-1][:, :size]  # eigh sorts eigenvalues in ascending order
    # Rounding can make an eigenvalue of zero negative.
    return vectors * _signs(vectors) * np.sqrt(np.maximum(values[::-1][:size], 0.0))


def tsne(cloud: FactorSet, perplexity: float | None = None, seed: int | None = None) -> Float[np.ndarray, "point 2"]:
    """Embed factors in a plane by t-SNE after PCA, which keeps nearest neighbors together.

    Parameters
    ----------
    cloud : FactorSet
    perplexity : float, optional
        Effective number of neighbors. By default the paper's 30, or a third of the points if that is smaller.
    seed : int, optional
        Seed of a random initialization; by default t-SNE starts from the first two principal components.

    Raises
    ------
    ValueError
        The perplexity is not above 0 and below the number of points.
    """
    from sklearn.manifold import TSNE  # this import takes half a second, and only this figure needs it

    points = len(cloud.flat)
    if perplexity is None:
        perplexity = default_perplexity(points)
    if not 0 < perplexity < points:
        raise ValueError(f"perplexity must be > 0 and < {points}, the number of points, got {perplexity:g}")
    components = pca(cloud, _PCA_SIZE)
    start: Any = "random"
    if seed is None:
        # Same as init="pca", except that it also works if all points coincide.
        start = components[:, :2] * (1e-4 / (components[:, 0].std() or 1.0))
    plane = TSNE(2, perplexity=perplexity, init=start, random_state=seed or 0)
    return np.asarray(plane.fit_transform(components), dtype=np.float64)


def default_perplexity(points: int) -> float:
    """Return the default perplexity of a t-SNE embedding: the paper's 30, or a third of the points if smaller."""
    return min(_PAPER_PERPLEXITY, points / 3)
