"""Estimates over seeds: Student's t, seeds crossed with test rows, and the jackknife for pairs of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorascope.array_types import Float, Int
from lorascope.files.lazy_scipy import stdtr, stdtrit

CONFIDENCE = 0.95
MINIMUM_SEEDS = 3  # of an interval that is drawn: with two, it reaches 12.7 standard errors to each side


class Interval(NamedTuple):
    """Mean over seeds with its confidence interval; the bounds are NaN if ``n`` is one."""

    mean: float
    low: float
    high: float
    n: int

    def format(self, digits: int) -> str:
        """Return the mean and half the width of the interval, such as ``84.4 ± 1.1``; only the mean if ``n`` is one."""
        mean = f"{self.mean:.{digits}f}"
        if self.n < 2:
            return mean
        return f"{mean} ± {(self.high - self.low) / 2:.{digits}f}"


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with its standard errors, from which intervals follow.

    The half width of its interval is the largest of those of its standard errors, and its p-values agree with the
    interval: the interval at a one-sided level ends at the bound whose p-value is this level.

    Parameters
    ----------
    mean : float
        The estimate.
    n : int
        Number of seeds.
    errors : tuple of (float, float)
        Standard errors with their degrees of freedom, the last one over seeds; none with a single seed.
    rows : tuple of (float, float)
        Standard error over test rows only, with its degrees of freedom; none where rows are not samples.
    """

    mean: float
    n: int
    errors: tuple[tuple[float, float], ...]
    rows: tuple[tuple[float, float], ...] = ()

    def half_width(self, level: float) -> float:
        """Return half the width of the interval with an error of ``level`` at each end; NaN with a single seed."""
        return max((float(stdtrit(degrees, 1 - level)) * error for error, degrees in self.errors), default=np.nan)

    def interval(self, level: float) -> Interval:
        """Return the interval with an error of ``level`` at each end."""
        half = self.half_width(level)
        return Interval(self.mean, self.mean - half, self.mean + half, self.n)

    def p_above(self, bound: float) -> float:
        """Return the one-sided p-value of the true value being above a bound; NaN with a single seed."""
        return max((_tail(self.mean - bound, *error) for error in self.errors), default=np.nan)

    def p_below(self, bound: float) -> float:
        """Return the one-sided p-value of the true value being below a bound; NaN with a single seed."""
        return max((_tail(bound - self.mean, *error) for error in self.errors), default=np.nan)


def _tail(distance: float, error: float, degrees: float) -> float:
    if error == 0:
        return float(distance <= 0)
    return float(stdtr(degrees, -distance / error))


def t_estimate(values: Float[np.ndarray, "seed"]) -> Estimate:
    """Estimate the mean over independent seeds with Student's t.

    Raises
    ------
    ValueError
        There are no values.
    """
    if not len(values):
        raise ValueError("values must contain at least 1 value, got none")
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Estimate(mean, n, ())
    error = float(values.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, n, ((error, float(n - 1)),))


def t_interval(values: Float[np.ndarray, "seed"]) -> Interval:
    """Compute the mean over independent seeds with Student's 95% t-interval.

    Raises
    ------
    ValueError
        There are no values.
    """
    return t_estimate(values).interval((1 - CONFIDENCE) / 2)


def two_way_estimate(differences: Float[np.ndarray, "seed row"], clusters: Int[np.ndarray, "row"]) -> Estimate:
    """Estimate a mean and its interval over seeds and test rows, both of which are samples.

    The variance adds that between seeds and that between clusters of rows, and subtracts that of the cells, which both
    contain (Cameron, Gelbach and Miller 2011, Robust inference with multiway clustering). It is at least as large as
    each of the two, its degrees of freedom follow Satterthwaite, and the interval is never narrower than the
    t-interval over seeds.

    Parameters
    ----------
    differences : array (seed, row)
        What the statistic scores on a row, minus what the control does.
    clusters : array (row,)
        Cluster of each row, numbered from 0: rows of one cluster, such as one review, are not independent.
    """
    (seeds, rows), number = differences.shape, int(clusters.max()) + 1
    by_seed = differences.mean(axis=1)
    mean = float(by_seed.mean())
    if seeds < 2:
        return Estimate(mean, seeds, ())
    by_cluster = np.array(
        [np.bincount(clusters, row - row_mean, number) for row, row_mean in zip(differences, by_seed, strict=True)]
    )
    common = by_cluster.mean(axis=0)
    used = len(np.unique(clusters))
    v_seed = float(by_seed.var(ddof=1)) / seeds
    v_row = used / (used - 1) * float((common**2).sum()) / rows**2  # corrected for a small number of clusters
    v_cell = float(((by_cluster - common) ** 2).sum()) / (seeds * (seeds - 1) * rows**2)
    total = max(v_seed + v_row - v_cell, v_seed, v_row)
    degrees_terms = v_seed**2 / (seeds - 1) + v_row**2 / (used - 1) + v_cell**2 / ((seeds - 1) * (used - 1))
    degrees = float(seeds - 1)
    if degrees_terms:
        degrees = max(total**2 / degrees_terms, degrees)
    errors = (total**0.5, degrees), (v_seed**0.5, float(seeds - 1))
    return Estimate(mean, seeds, errors, rows=((v_row**0.5, float(used - 1)),))


def pseudo_values(pairs: Float[np.ndarray, "seed seed"]) -> Float[np.ndarray, "seed"]:
    """Return the jackknife pseudo-values, one per seed, of a mean over pairs of runs with different seeds.

    With U the mean over all pairs and U_i the mean without seed i in either arm, they are ``n U - (n - 1) U_i``
    (Arvesen 1969, Jackknifing U-statistics). They are linear in the pairs: those of a difference are the differences.

    Parameters
    ----------
    pairs : array (seed, seed)
        Value of the run with seed i of one arm and the run with seed j of another or the same arm. The diagonal is not
        read, because runs with equal seeds share their start.

    Returns
    -------
    array (seed,)
        One value per seed. With two seeds, where no pair is left without one of them, both are U; a single one is NaN.
    """
    n = len(pairs)
    if n < 2:
        return np.full(n, np.nan)
    off_diagonal = np.where(np.eye(n, dtype=bool), 0.0, pairs)
    total = off_diagonal.sum()
    mean = total / (n * (n - 1))
    if n < 3:
        return np.full(n, mean)
    without = (total - off_diagonal.sum(axis=0) - off_diagonal.sum(axis=1)) / ((n - 1) * (n - 2))
    return n * mean - (n - 1) * without


def jackknife_estimate(values: Float[np.ndarray, "seed"]) -> Estimate:
    """Estimate a mean over pairs of seeds from its pseudo-values; without an interval below three seeds."""
    if len(values) < 3:
        return Estimate(float(values.mean()), len(values), ())
    return t_estimate(values)


def band(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Compute the mean and 95% t-interval over the seeds of every cell.

    Parameters
    ----------
    table : DataFrame
        Table with ``value`` and the columns ``by``, one row per run and cell.
    by : sequence of str
        Columns that define a cell.

    Returns
    -------
    DataFrame
        ``by``, then ``value`` (the mean), ``low``, ``high`` and ``n``, in order of first appearance.
    """
    cells = table.groupby(list(by), observed=True, dropna=False, sort=False)["value"]
    statistics = cells.agg(value="mean", deviation="std", n="count").reset_index()
    n = statistics["n"].to_numpy()
    degrees = np.where(n > 1, n - 1, np.nan)  # one value has no standard deviation, so no interval
    half = stdtrit(degrees, 0.5 + CONFIDENCE / 2) * statistics["deviation"].to_numpy(np.float64) / np.sqrt(n)
    bounds = statistics.assign(low=statistics["value"] - half, high=statistics["value"] + half)
    return bounds[[*by, "value", "low", "high", "n"]]


def seed_cells(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Compute what figures draw of the seeds of every cell: mean and 95% t-interval, or two seeds without interval.

    Returns
    -------
    DataFrame
        As `band`, with NaN in ``low`` and ``high`` below ``MINIMUM_SEEDS`` seeds. Two seeds are in ``smaller`` and
        ``larger``, which are NaN in other cells.
    """
    cells = band(table, columns)
    is_pair = cells["n"] == 2
    ends = (
        table.groupby(list(columns), observed=True, dropna=False, sort=False)["value"].agg(["min", "max"]).reset_index()
    )
    bounds = cells[["low", "high"]].where(cells["n"] >= MINIMUM_SEEDS)
    return cells.assign(smaller=ends["min"].where(is_pair), larger=ends["max"].where(is_pair), **bounds)
