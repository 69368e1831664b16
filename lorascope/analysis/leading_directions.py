"""Leading singular vectors of updates, and the principal angles between them, for any pair of methods.

Every method has one update per module, regardless of its parametrization, so all methods can be compared. Angles are
reported with a random baseline: the angle between as many random directions in the same dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.analysis.spectra import Spectra, above_rounding
from lorascope.array_types import Float
from lorascope.updates import Update, principal_angles

_DRAWS = 500


class Directions(NamedTuple):
    """Leading directions of an update: its first singular vectors, as columns."""

    left: Float[np.ndarray, "out k"]
    right: Float[np.ndarray, "in k"]

    @property
    def size(self) -> int:
        """Number of singular vectors per side, k."""
        return self.left.shape[1]


def leading_singular_vectors(update: Update, k: int) -> Directions:
    """Return leading directions of an update: the first k left and right singular vectors, or all if it has fewer."""
    U, _, V = update.svd()
    return Directions(U[:, :k], V[:, :k])


@cache
def chance_angle(dim: int, k: int) -> float:
    """Estimate the mean principal angle in degrees between random directions: two subspaces with k dimensions.

    The estimate uses 500 draws with a fixed seed. By symmetry, the first subspace can be fixed to the first k axes.
    The second is a normal matrix made orthonormal. Its remaining rows matter only through their triangular factor,
    whose distribution is known (Bartlett), so the cost does not grow with ``dim``.
    """
    draw = np.random.default_rng(0)
    rows = min(dim, 2 * k)
    normal = draw.standard_normal((_DRAWS, rows, k))
    if rows < dim:
        normal[:, k:] = np.triu(normal[:, k:])
        diagonal = np.arange(k)
        normal[:, k + diagonal, diagonal] = np.sqrt(draw.chisquare(dim - k - diagonal, (_DRAWS, k)))
    cosines = np.linalg.svd(np.linalg.qr(normal)[0][:, :k], compute_uv=False)
    return float(np.degrees(np.arccos(np.minimum(cosines, 1.0))).mean())  # rounding can exceed a cosine of 1


def angle_and_chance(first: Directions, second: Directions) -> tuple[float, float]:
    """Compute the mean angle in degrees between the leading directions of two updates, and its random baseline.

    The mean is over outputs and inputs, with the same number of leading directions of both updates.
    """
    k = min(first.size, second.size)
    sides = zip(first, second, strict=True)
    angle = np.degrees([principal_angles(left[:, :k], right[:, :k]) for left, right in sides]).mean()
    return float(angle), float(np.mean([chance_angle(len(side), k) for side in first]))


def average_angles(pairs: Sequence[tuple[Mapping[str, Directions], Mapping[str, Directions]]]) -> tuple[float, float]:
    """Average the angles between leading directions over pairs of runs and the modules where both have a direction.

    Returns
    -------
    (float, float)
        Mean angle and random baseline in degrees; NaN if no module can be compared.
    """
    angles = []
    for first, second in pairs:
        for module in first:
            if module in second and first[module].size and second[module].size:
                angles.append(angle_and_chance(first[module], second[module]))
    if not angles:
        return np.nan, np.nan
    mean, chance = np.mean(angles, axis=0)
    return float(mean), float(chance)


def pool_spectra(spectra: Spectra, modules: Sequence[str]) -> pd.DataFrame:
    """Compute the root mean square over modules of the singular value of each leading direction, in descending order.

    Modules with fewer singular values count as zero, as do values that are rounding errors of zero.

    Returns
    -------
    DataFrame
        ``component`` (from 1), ``value``.
    """
    sigmas: list[Any] = [spectra[module] for module in modules]
    squares = np.zeros(max(map(len, sigmas)))
    for sigma in sigmas:
        squares[: len(sigma)] += above_rounding(sigma) ** 2
    squares = squares[: np.count_nonzero(squares)]  # singular values are in descending order, so zeros come last
    return pd.DataFrame({"component": np.arange(1, len(squares) + 1), "value": np.sqrt(squares / len(sigmas))})
