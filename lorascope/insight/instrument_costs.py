"""Costs of the instruments in forward passes over their rows, and the announcement of a long measurement."""

from __future__ import annotations

import sys

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


def dial_passes(by: str, parts: int) -> float:
    """Return how many passes over task and keep rows a dial takes."""
    if by == WHOLE:
        return _SCALES
    # Groups change several modules, from which nothing can be replayed.
    removal = 1.0 if by in ("layer", "role") else _REPLAYED
    return _SCALES * (1 + _CURVES) + removal * parts + BACKWARD * (NODES + 1)


def price_passes(cuts: int) -> float:
    """Return how many passes over its rows a price takes."""
    # Signals have real and drawn labels, and path shares are of a quarter of the rows.
    return cuts + 2 * BACKWARD + NODES * BACKWARD / 4


def announce(instrument: str, seconds: float, progress: bool) -> None:
    """Print how long a measurement takes, if it is long."""
    if progress and seconds >= _LONG:
        print(f"{instrument}: about {seconds:.0f} CPU seconds", file=sys.stderr)
