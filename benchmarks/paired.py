"""Fair timing of two functions: alternating in one process, by CPU time, with a confidence interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """Time of the first function relative to the second.

    Parameters
    ----------
    median, low, high : float
        Median of the paired ratios and its 95% bootstrap interval.
    seconds : (float, float)
        Median CPU seconds of the two functions.
    pairs : int
        Number of pairs.
    """

    median: float
    low: float
    high: float
    seconds: tuple[float, float]
    pairs: int

    def meets(self, target: float) -> bool:
        """Return whether the median meets the target and the interval exceeds it by at most 3%."""
        return self.median <= target and self.high <= 1.03 * target

    def row(self, label: str, target: float) -> str:
        """Format the ratio as one line of a report."""
        verdict = "met" if self.meets(target) else "MISSED"
        first, second = (1e3 * value for value in self.seconds)
        return (
            f"{label:<38} {self.median:.3f} [{self.low:.3f}, {self.high:.3f}]  target {target:.2f} {verdict:<6}"
            f"  {first:8.1f} / {second:.1f} ms, {self.pairs} pairs"
        )


def compare(
    first: Callable[[], object],
    second: Callable[[], object],
    pairs: int = 40,
    warmup: int = 3,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.process_time,
) -> Ratio:
    """Time two functions in pairs; the function that runs first alternates from pair to pair.

    Parameters
    ----------
    first, second : callables without arguments
    pairs : int
        Number of timed pairs.
    warmup : int
        Number of untimed pairs before them.
    seconds : float
        CPU time after which no further pair starts; at least three pairs are timed.
    clock : callable
        Function that returns seconds; by default the CPU seconds of this process.
    """
    for _ in range(warmup):
        first(), second()
    rows: list[list[float]] = []
    while len(rows) < pairs and (len(rows) < 3 or np.sum(rows) < seconds):
        row = [0.0, 0.0]
        for which in (0, 1) if len(rows) % 2 else (1, 0):
            start = clock()
            (first, second)[which]()
            row[which] = clock() - start
        rows.append(row)
    times, pairs = np.array(rows), len(rows)
    ratios = times[:, 0] / times[:, 1]
    draws = np.random.default_rng(0).integers(pairs, size=(2000, pairs))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high), tuple(np.median(times, axis=0).tolist()), pairs)
