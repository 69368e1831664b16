"""Mean of a difference over rows that two states of a model share, with its standard error over clusters of rows."""

from __future__ import annotations

import math

import numpy as np

from lorascope.analysis.seed_intervals import Estimate
from lorascope.array_types import Float, Int

LEVEL = 0.025  # error at each end of a 95% interval
_NORMAL = 1.96  # standard errors in half a 95% interval of many rows


def estimate_rows(
    differences: Float[np.ndarray, "row"], counts: Float[np.ndarray, "row"], clusters: Int[np.ndarray, "row"]
) -> Estimate:
    """Estimate the mean of a difference per target over rows, which are samples; the seed of the training is fixed.

    The mean is a ratio of sums, with the variance of the clusters' sums of ``difference - mean * count``
    (linearization), with the usual correction for a small number of clusters.

    Parameters
    ----------
    differences : array (row,)
        Difference of each row, summed over its targets.
    counts : array (row,)
        Number of targets of each row: 1 for a class, the number of target tokens for a language model.
    clusters : array (row,)
        Cluster of each row, numbered from 0: rows of one cluster, such as one article, are not independent.

    Raises
    ------
    ValueError
        There are fewer than two clusters.
    """
    used = len(np.unique(clusters))
    if used < 2:
        raise ValueError(f"rows must be in at least 2 clusters, got {used}")
    total = float(counts.sum())
    mean = float(differences.sum()) / total
    # Residuals of the ratio, so that a row's length adds no spread.
    sums = np.bincount(clusters, differences - mean * counts)
    error = math.sqrt(used / (used - 1) * float((sums**2).sum())) / total
    return Estimate(mean, used, ((error, float(used - 1)),))


def add_estimates(first: Estimate, second: Estimate, factor: float) -> Estimate:
    """Return the estimate of ``first + factor * second`` for independent estimates of rows.

    The degrees of freedom follow Satterthwaite.
    """
    (error, degrees), (other_error, other_degrees) = first.errors[0], second.errors[0]
    variance, other_variance = error**2, (factor * other_error) ** 2
    total = variance + other_variance
    joint = degrees + other_degrees
    if total > 0:
        joint = total**2 / (variance**2 / degrees + other_variance**2 / other_degrees)
    return Estimate(first.mean + factor * second.mean, min(first.n, second.n), ((math.sqrt(total), joint),))


def rows_to_decide(estimate: Estimate, bound: float, rows: int) -> float:
    """Return the number of rows whose 95% interval would exclude a bound, if mean and spread stay; inf at the bound."""
    distance = abs(estimate.mean - bound)
    if distance == 0:
        return math.inf
    return rows * (_NORMAL * estimate.errors[0][0] / distance) ** 2
