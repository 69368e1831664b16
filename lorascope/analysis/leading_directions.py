"""Where the updates of different methods agree: their leading directions, and the angles between these.

Every method gives one update a module, whatever it is made of, so that all can be asked alike. An angle stands beside
the one that independent random directions of the same number have in the same dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.analysis.spectra import Spectra
from lorascope.updates.low_rank import Dense, LowRank, principal_angles

_DRAWS = 500
_ROUNDING = 1e-8  # what a Gram matrix tells from zero


class Directions(NamedTuple):
    """The leading singular vectors of an update, as columns."""

    left: Float[np.ndarray, "out k"]
    right: Float[np.ndarray, "in k"]


def leading_singular_vectors(update: LowRank | Dense, k: int) -> Directions:
    """The first k directions of an update's outputs and inputs, or as many as it has."""
    U, _, V = update.svd()
    return Directions(U[:, :k], V[:, :k])


def mean_angle(first: Directions, second: Directions) -> float:
    """Mean principal angle in degrees of two updates of one module, over outputs and inputs.

    Of the first directions of each as many as the other has, so that no angle is small because one side has all.
    """
    k = min(first.left.shape[1], second.left.shape[1])
    sides = zip(first, second, strict=True)
    return float(np.degrees([principal_angles(one[:, :k], other[:, :k]) for one, other in sides]).mean())


@cache
def chance_angle(dim: int, k1: int, k2: int) -> float:
    """Mean principal angle in degrees of random subspaces with k1 and k2 dimensions; 500 draws of a fixed seed.

    Of two random subspaces one may lie along the first axes, for all that the angles tell. Of the other, a normal
    matrix made orthonormal, the rows outside count by their triangle alone, whose distribution is known (Bartlett): so
    the dimension costs nothing.
    """
    draw = np.random.default_rng(0)
    rows = min(dim, k1 + k2)
    drawn = draw.standard_normal((_DRAWS, rows, k2))
    if rows < dim:
        drawn[:, k1:] = np.triu(drawn[:, k1:])
        places = np.arange(k2)
        drawn[:, k1 + places, places] = np.sqrt(draw.chisquare(dim - k1 - places, (_DRAWS, k2)))
    cosines = np.linalg.svd(np.linalg.qr(drawn)[0][:, :k1], compute_uv=False)
    return float(np.degrees(np.arccos(np.minimum(cosines, 1.0))).mean())


def angles(pairs: Sequence[tuple[Mapping[str, Directions], Mapping[str, Directions]]]) -> tuple[float, float]:
    """Mean over pairs of runs, and over the modules in which both have a direction, of ``mean_angle`` and of chance.

    Returns
    -------
    (float, float)
        In degrees; NaN where no module can be compared.
    """
    found = []
    for first, second in pairs:
        for module in (name for name in first if name in second):
            one, other = first[module], second[module]
            if k := min(one.left.shape[1], other.left.shape[1]):
                chance = float(np.mean([chance_angle(len(side), k, k) for side in one]))
                found.append((mean_angle(one, other), chance))
    mean, chance = np.mean(found, axis=0) if found else (np.nan, np.nan)
    return float(mean), float(chance)


def pool_spectra(spectra: Spectra, modules: Sequence[str]) -> pd.DataFrame:
    """Root mean square over modules of their largest singular values, their second largest, and so on.

    A module that has fewer counts as zero, and so does a value that is rounding beside the largest.

    Returns
    -------
    DataFrame
        ``component`` (from 1), ``value``.
    """
    sigmas: list[Any] = [spectra[module] for module in modules]
    squares = np.zeros(max(map(len, sigmas)))
    for sigma in sigmas:
        squares[: len(sigma)] += np.where(sigma > _ROUNDING * np.max(sigma, initial=0.0), sigma, 0.0) ** 2
    squares = squares[: np.count_nonzero(squares)]
    return pd.DataFrame({"component": np.arange(1, len(squares) + 1), "value": np.sqrt(squares / len(sigmas))})
