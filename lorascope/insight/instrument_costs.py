"""Costs of the instruments in forward passes over their rows, and the announcement of a long measurement."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from lorascope.analysis.dial import WHOLE
from lorascope.insight.update_parts import ScaledUpdates
from lorascope.observe.measured_rows import RowMeasure

NODES = 5  # of the quadrature of path shares; with 5, shares of a planted decoder missed its learn by 2e-5 of it
_SCALES = 6
_CURVES = 2  # one in two parts usually gets a curve: 14 of 36 modules of MiniLM, 17 of 28 of the planted student
_REPLAYED = 0.6  # of a pass: parts of one block are replayed from it on
_LONG = 10.0  # CPU seconds of a measurement that is announced


class Passes(NamedTuple):
    """Number of forward passes of the adapted model over its rows, and of passes with gradients."""

    forward: float
    gradient: float


class PassSeconds(NamedTuple):
    """CPU seconds per row of a forward pass of the adapted model, and of a pass with the gradients of its parts."""

    forward: float
    gradient: float

    def per_row(self, passes: Passes) -> float:
        """Return the seconds per row of a number of passes."""
        return passes.forward * self.forward + passes.gradient * self.gradient


def time_passes(
    measure: RowMeasure, updates: ScaledUpdates, clock: Callable[[], float] = time.process_time
) -> PassSeconds:
    """Time a forward pass and a pass with gradients of a batch of medium length; the adapters are attached."""
    batch = measure.batches[len(measure.batches) // 2]

    def forward() -> None:
        with torch.no_grad():
            measure.measure(batch)

    def gradient() -> None:
        with updates.gated(1.0) as gates:
            torch.autograd.grad(measure.measure(batch).sum(), [*gates.values()], materialize_grads=True)

    seconds = []
    for run_pass in (forward, gradient):
        run_pass()  # the first pass also allocates memory
        began = clock()
        run_pass()
        seconds.append((clock() - began) / len(batch["labels"]))
    return PassSeconds(*seconds)


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


class RemainingSeconds:
    """CPU seconds that remain of a budget."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def takes(self, cost: float) -> bool:
        """Return whether a cost fits, and subtract it if it does."""
        if cost > self.seconds:
            return False
        self.seconds -= cost
        return True


def dial_passes(by: str, parts: int) -> Passes:
    """Return how many passes over task and keep rows a dial takes; a probe shares the pass over the rows to keep."""
    if by == WHOLE:
        return Passes(_SCALES + 1, 0)
    # Roles have a module in the first block, so that nothing precedes them.
    share = 1.0 if by == "role" else _REPLAYED
    # Without the part and as trained, a curve has its values already.
    scaled = math.ceil(parts / _CURVES) * (_SCALES - 2)
    return Passes(_SCALES + 1 + share * (parts + scaled), NODES + 1)


def reading_passes(components: int, selection: float) -> Passes:
    """Return how many passes over its rows a reading takes.

    Parameters
    ----------
    components : int
        Number of components to read.
    selection : float
        Rows that order the components, as a fraction of those that are read.
    """
    # Margins of the base and of the adapted model. What components write needs a pass with stored outputs, another one
    # inside the blocks, and one without each component.
    forward = 4 + _REPLAYED * components
    # Contributions of all components on the selection rows, and of random ones on the rows that are read.
    return Passes(forward, 1 + selection)


def price_passes(cuts: int, shared: float) -> Passes:
    """Return how many passes over its rows a price takes.

    Parameters
    ----------
    cuts : int
        Number of cuts, without those to full rank and to rank 0.
    shared : float
        Fraction of the rows that path shares are measured on.
    """
    # Signals need the gradients of all weights with real and with drawn labels, once for their means and once by block.
    # Blocks are not sorted by length: on 160 sentences, a pass over them took twice the time of one over batches.
    return Passes(2 + cuts, 9 + 2 * shared * NODES)


def announce(instrument: str, seconds: float, progress: bool) -> None:
    """Print how long a measurement takes, if it is long."""
    if progress and seconds >= _LONG:
        print(f"{instrument}: about {seconds:.0f} CPU seconds", file=sys.stderr)
