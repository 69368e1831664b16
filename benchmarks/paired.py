"""Fair timing of two functions, alternating in one process, by CPU time; and the command line of a benchmark."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from measurements import PAIRS, MeasuredLine, text


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

    def line(self, what: str, case: str = "", aim: float | None = None, **more: Any) -> MeasuredLine:
        """Return the ratio as a line of the page."""
        return MeasuredLine(
            what=what, case=case, value=self.median, low=self.low, high=self.high, pairs=self.pairs, aim=aim, **more
        )

    def inverse(self, times: float = 1) -> Ratio:
        """Return the time of the second function relative to the first one, multiplied by ``times``."""
        low, median, high = (times / value for value in (self.high, self.median, self.low))
        return Ratio(median, low, high, self.seconds[::-1], self.pairs)


def compare(
    first: Callable[[], object],
    second: Callable[[], object],
    pairs: int = 40,
    warmup: int = 3,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.process_time,
    turns: int = 1,
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
    turns : int
        Number of calls of each function per pair, in turn. With more turns, a machine that slows down or
        speeds up within a pair favors one of the two less.
    """
    for _ in range(warmup * turns):
        first(), second()
    rows: list[list[float]] = []
    while len(rows) < pairs and (len(rows) < 3 or np.sum(rows) < seconds):
        row = [0.0, 0.0]
        for which in ((0, 1) if len(rows) % 2 else (1, 0)) * turns:
            start = clock()
            (first, second)[which]()
            row[which] += clock() - start
        rows.append(row)
    times, pairs = np.array(rows), len(rows)
    return Ratio(*median_interval(times[:, 0] / times[:, 1]), tuple(np.median(times, axis=0).tolist()), pairs)


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the median of measured values, and its bootstrap interval of 95%."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def report(lines: Callable[[int], Iterable[MeasuredLine]], documented: str | None) -> None:
    """Run a benchmark as a script, and print its lines: the ``main`` of every benchmark.

    Parameters
    ----------
    lines : callable
        The benchmark: from a number of pairs to its lines.
    documented : str, optional
        Docstring of the script, whose first line is its help.
    """
    parser = argparse.ArgumentParser(description=(documented or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of fast contestants; slow ones have fewer")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options = parser.parse_args()
    for line in lines(options.pairs):
        print(json.dumps(asdict(line)) if options.json else text(line), flush=True)
