"""Costs of the instruments in forward passes over their rows, and the announcement of a long measurement."""

from __future__ import annotations

import sys
from typing import NamedTuple

from lorascope.analysis.dial import WHOLE

NODES = 5  # of the quadrature of path shares; with 5, shares of a planted decoder missed its learn by 2e-5 of it
BACKWARD = 3
"""Passes that a gradient takes, with its forward pass."""
READING = 15
"""Passes of the reader: contributions of all components, then of random ones."""
_SCALES = 6
_CURVES = 4  # parts that usually get a curve
_REPLAYED = 0.6  # of a pass: parts of one module are replayed from its block on
_LONG = 10.0  # CPU seconds of a measurement that is announced


class MeasurementCost(NamedTuple):
    """Estimated CPU seconds of a measurement: those of opening its model, and of each row; and its numbers of rows."""

    opening: float
    per_row: float
    rows: int
    fewest: int

    @property
    def seconds(self) -> float:
        """Seconds with all rows."""
        return self.seconds_of(self.rows)

    def seconds_of(self, rows: int) -> float:
        """Return the seconds with a number of rows."""
        return self.opening + rows * self.per_row

    def rows_within(self, budget: float) -> int:
        """Return the largest number of rows, a multiple of 8, that takes a budget of seconds at most; 0 if too few."""
        rows = int((budget - self.opening) / self.per_row) // 8 * 8
        return min(rows, self.rows) if rows >= self.fewest else 0


def dial_passes(by: str, parts: int, probes: bool) -> float:
    """Return how many passes over task and keep rows a dial takes; ``probes`` is whether it has a probe."""
    # A probe reads the rows to keep, half of all, a second time.
    forward = 1.5 if probes else 1.0
    if by == WHOLE:
        return forward * (_SCALES + 1)
    # Groups change several modules, from which nothing can be replayed.
    removal = 1.0 if by in ("layer", "role") else _REPLAYED
    scales = _SCALES + 1 + (_SCALES - 1) * min(_CURVES, parts)
    return forward * (scales + removal * parts) + BACKWARD * (NODES + 1)


def price_passes(cuts: int) -> float:
    """Return how many passes over its rows a price takes; ``cuts`` is without those to full rank and to rank 0."""
    # Signals have real and drawn labels, and path shares are of a quarter of the rows.
    return 2 + cuts + 2 * BACKWARD + NODES * BACKWARD / 4


def announce(instrument: str, seconds: float, progress: bool) -> None:
    """Print how long a measurement takes, if it is long."""
    if progress and seconds >= _LONG:
        print(f"{instrument}: about {seconds:.0f} CPU seconds", file=sys.stderr)
