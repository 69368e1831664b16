"""Factors of many adapters as points: their cosines in three views, and the plane they are drawn on.

(B, A) and (B R^-1, R A) are one update for every invertible R, and training from another A_0 ends at another R. The raw
view compares the arrays as they are, as the paper's figure does, and so tells of R, too. The other two do not:

canonical  A = sqrt(sigma) V^T and B = U sqrt(sigma) of the update's singular value decomposition; a direction with no
           singular value is a row of zeros, and one of two equal values is arbitrary, which the space is not
space      the row space of A, the column space of B: all that the factor alone knows whatever R is

Source: HydraLoRA (arXiv 2404.19245), figure 3, for the raw view and the t-SNE of it.

Departs: every factor has length one before it is compared, since B, grown from zero, is short where little was learned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.updates.linalg import all_finite, as_float64, numerical_rank
from lorascope.updates.low_rank import LowRank

Factor = Literal["A", "B"]
View = Literal["raw", "canonical", "space"]
VIEWS: tuple[View, ...] = ("raw", "canonical", "space")
Updates = Mapping[str, Mapping[str, LowRank]]

_PAPER_PERPLEXITY = 30.0
_PCA_SIZE = 50  # what t-SNE is usually given; more components only slow it down


@dataclass(frozen=True, eq=False)
class FactorSet:
    """Factors that can be compared with each other: one point for every slot (a module's A or B) and run.

    Parameters
    ----------
    shape : tuple of int
        What they have in common: (rank, width), or (width,) for spaces.
    modules, factors : sequence of str
        Of each slot.
    runs, domains : sequence of str
        Of each run.
    cosine : array (slot, run, slot, run)
        Cosine between points; between spaces |U_1^T U_2|_F^2 / sqrt(k_1 k_2), the cosine of their projections.
    """

    shape: tuple[int, ...]
    modules: Sequence[str]
    factors: Sequence[str]
    runs: Sequence[str]
    domains: Sequence[str]
    cosine: Float[np.ndarray, "slot run slot run"]

    @property
    def flat(self) -> Float[np.ndarray, "point point"]:
        """Cosines of all points, in the order of ``table``."""
        points = len(self.modules) * len(self.runs)
        return self.cosine.reshape(points, points)

    def table(self) -> pd.DataFrame:
        """``module, factor, run, domain``, one row a point."""
        slots = zip(self.modules, self.factors, strict=True)
        runs = list(zip(self.runs, self.domains, strict=True))
        rows = [(*slot, *run) for slot in slots for run in runs]
        return pd.DataFrame(rows, columns=["module", "factor", "run", "domain"])


def factored_updates(updates: Mapping[str, Any]) -> dict[str, LowRank]:
    """Of a run's updates those that have an A and a B."""
    return {module: update for module, update in updates.items() if isinstance(update, LowRank)}


def common_modules(updates: Updates) -> list[str]:
    """Modules that all runs hold, in the order of the first."""
    first, *others = updates.values()
    return [module for module in first if all(module in found for found in others)]


def clouds(
    updates: Updates, domains: Mapping[str, str], factors: Sequence[Factor] = ("A", "B"), view: View = "raw"
) -> list[FactorSet]:
    """Sort the factors of runs by shape; factors of different shapes are never compared, cut or padded.

    Parameters
    ----------
    updates : mapping run -> module -> update
        Modules that not all runs hold are left out.
    domains : mapping run -> str
        The text a run was trained on.
    factors : sequence of {"A", "B"}
        Together, so that A and B of a square module lie in one cloud.
    view : {"raw", "canonical", "space"}

    Raises
    ------
    ValueError
        The runs have no module in common, a module's factor has another rank in another run or is of another model's
        width, or one is zero or not finite.
    """
    runs, modules = list(updates), common_modules(updates)
    if not modules:
        raise ValueError(f"runs {', '.join(runs)} have no adapted module in common")
    slots = defaultdict(list)
    for factor in factors:
        for module in modules:
            arrays = [view_factor(updates[run][module], factor, view, f"{module} in run {run}") for run in runs]
            slots[_shape(arrays, view, f"{factor} of {module}")].append((module, factor, arrays))
    found = []
    for shape, members in slots.items():
        arrays = [array for _, _, of_runs in members for array in of_runs]
        size = (len(members), len(runs))
        names, kinds = [module for module, _, _ in members], [factor for _, factor, _ in members]
        cosine = (_subspace_overlaps(arrays) if view == "space" else _cosines(arrays)).reshape(*size, *size)
        found.append(FactorSet(shape, names, kinds, runs, [domains[run] for run in runs], cosine))
    return found


def basis(update: LowRank, factor: Factor) -> Float[np.ndarray, "width k"]:
    """Orthonormal columns that span the row space of A, or the column space of B.

    A direction that the precision in which the factor is kept cannot tell from rounding is none. To round a factor C
    moves it by at most eps / 2 |C|_F in norm, and so every singular value; twice that is allowed for, since a factor
    may have been scaled once more. A float32 array with nothing in its lower 16 bits was kept as bfloat16.
    """
    columns = update.A.T if factor == "A" else update.B
    U, sigma, _ = np.linalg.svd(as_float64(columns), full_matrices=False)
    kept = np.count_nonzero(sigma > _eps(columns) * np.linalg.norm(sigma))
    return U[:, : min(int(kept), numerical_rank(sigma, columns.shape))]


def _eps(array: np.ndarray) -> float:
    """Of the precision in which an array was kept."""
    if array.dtype == np.float32 and not np.any(np.ascontiguousarray(array).view(np.uint32) & 0xFFFF):
        return 2.0**-7
    return float(np.finfo(array.dtype).eps)


def canonical(update: LowRank, factor: Factor) -> Float[np.ndarray, "rank width"]:
    """The factor of the balanced factorisation by singular vectors, a row a component; B is transposed.

    Of the two signs of a component the one is taken that makes the largest entry of its left vector positive. A
    component without a singular value, where the update has less than its rank, is a row of zeros: sqrt(0) times a
    vector that a decomposition may choose as it likes.
    """
    U, sigma, V = update.svd()
    largest = np.abs(U).argmax(axis=0)
    signs = np.sign(np.take_along_axis(U, largest[None], axis=0))
    rows = (np.sqrt(sigma) * signs * (V if factor == "A" else U)).T
    return np.vstack([rows, np.zeros((update.rank - len(rows), rows.shape[1]))])


def view_factor(update: LowRank, factor: Factor, view: View, where: str) -> Float[np.ndarray, "k width"]:
    """What is compared of a factor in a view, a row a component; what has no direction is refused."""
    own = update.A if factor == "A" else update.B
    if not all_finite(own, *((update.A, update.B) if view == "canonical" else ())):
        raise ValueError(f"{factor} of {where} holds NaN or infinity and has no direction: leave that run out")
    array = _array(update, factor, view)
    if not array.any():
        raise ValueError(f"{factor} of {where} is zero and has no direction: train it first")
    return array


def pca(cloud: FactorSet, size: int = 2) -> Float[np.ndarray, "point size"]:
    """The points along their first principal components, from the cosines alone.

    Of the two signs of a component the one is taken that makes its largest coordinate positive.
    """
    centred = cloud.flat - cloud.flat.mean(axis=0)
    centred -= centred.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    vectors = vectors[:, ::-1][:, :size]
    signs = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0))
    return vectors * signs * np.sqrt(np.maximum(values[::-1][:size], 0.0))


def tsne(cloud: FactorSet, perplexity: float | None = None, seed: int | None = None) -> Float[np.ndarray, "point 2"]:
    """The points on a plane that keeps neighbours together (t-SNE after PCA).

    Parameters
    ----------
    cloud : Cloud
    perplexity : float, optional
        About how many neighbours count; by default the paper's 30, or a third of the points where they are few.
    seed : int, optional
        Starts from a random plane; by default from the first two principal components.

    Raises
    ------
    ValueError
        The perplexity is not below the number of points.
    """
    from sklearn.manifold import TSNE  # half a second that no other figure needs to wait for

    points = len(cloud.flat)
    perplexity = default_perplexity(points) if perplexity is None else perplexity
    if not 0 < perplexity < points:
        raise ValueError(f"perplexity {perplexity:g} must lie between 0 and the number of points, {points}")
    components = pca(cloud, _PCA_SIZE)
    # What init="pca" does, but for points that all coincide.
    start = components[:, :2] * (1e-4 / (components[:, 0].std() or 1.0))
    plane = TSNE(2, perplexity=perplexity, init=start if seed is None else "random", random_state=seed or 0)
    return np.asarray(plane.fit_transform(components), dtype=np.float64)


def default_perplexity(points: int) -> float:
    """The paper's, or a third of the points where they are few."""
    return min(_PAPER_PERPLEXITY, points / 3)


def _array(update: LowRank, factor: Factor, view: View) -> Float[np.ndarray, "k width"]:
    if view == "space":
        return basis(update, factor).T
    if view == "canonical":
        return canonical(update, factor)
    return update.A if factor == "A" else update.B.T


def _shape(arrays: Sequence[np.ndarray], view: View, name: str) -> tuple[int, ...]:
    if len(widths := sorted({array.shape[1] for array in arrays})) > 1:
        told = " and ".join(map(str, widths))
        raise ValueError(f"{name} is {told} wide: these are runs of different models, and those of one are compared")
    shapes = {array.shape[1:] if view == "space" else array.shape for array in arrays}
    if len(shapes) > 1:
        told = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
        raise ValueError(f"{name} has the shapes {told}: factors of different ranks are compared by view='space'")
    return shapes.pop()


def _cosines(arrays: Sequence[np.ndarray]) -> Float[np.ndarray, "point point"]:
    flat = np.array([array.ravel() for array in arrays], dtype=np.float64)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return flat @ flat.T


def _subspace_overlaps(bases: Sequence[np.ndarray]) -> Float[np.ndarray, "point point"]:
    """|U_1^T U_2|_F^2 / sqrt(k_1 k_2) of every pair, the bases as rows."""
    sizes = np.array([len(rows) for rows in bases])
    stacked = np.concatenate(bases)
    first = np.cumsum(sizes) - sizes
    squares = (stacked @ stacked.T) ** 2
    sums = np.add.reduceat(np.add.reduceat(squares, first, axis=0), first, axis=1)
    return sums / np.sqrt(np.outer(sizes, sizes))
