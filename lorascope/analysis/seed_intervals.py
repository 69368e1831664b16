"""Student's t-intervals of means over seeds, as used by figures and claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.special import stdtrit

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean with its confidence interval; the bounds are NaN if ``n`` is one."""

    mean: float
    low: float
    high: float
    n: int

    def format(self, digits: int) -> str:
        """Return the mean and half the width of the interval, such as ``84.4 ± 1.1``; only the mean if ``n`` is one."""
        half = f" ± {(self.high - self.low) / 2:.{digits}f}" if self.n > 1 else ""
        return f"{self.mean:.{digits}f}{half}"


def _half_width(deviation: Float[np.ndarray, "cell"], n: Int[np.ndarray, "cell"]) -> Float[np.ndarray, "cell"]:
    """Compute half the t-interval of the means of n values from their sample standard deviations."""
    degrees = np.where(n > 1, n - 1, np.nan)  # one value has no standard deviation, so no interval
    return stdtrit(degrees, 0.5 + CONFIDENCE / 2) * deviation / np.sqrt(n)


def t_interval(values: Float[np.ndarray, "n"]) -> Interval:
    """Compute the mean of independent values with Student's 95% t-interval.

    Raises
    ------
    ValueError
        There are no values.
    """
    if not len(values):
        raise ValueError("values must contain at least 1 value, got none")
    n, mean = len(values), float(values.mean())
    deviation = values.std(ddof=1) if n > 1 else np.nan
    half = float(_half_width(np.array([deviation]), np.array([n]))[0])
    return Interval(mean, mean - half, mean + half, n)


def band(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Compute the mean and 95% t-interval over the runs of every cell.

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
    found = cells.agg(value="mean", deviation="std", n="count").reset_index()
    half = _half_width(found["deviation"].to_numpy(np.float64), found["n"].to_numpy())
    bounds = found.assign(low=found["value"] - half, high=found["value"] + half)
    return bounds[[*by, "value", "low", "high", "n"]]
