"""Tests of the gradient signal of modules over blocks of rows: directions that an adapter lacks, and its reach.

The blocks are in two halves, and what one half leads to is tested on the other one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorascope.analysis.seed_intervals import t_estimate
from lorascope.array_types import Float

FAMILY = 0.05
"""Probability of any false direction of one half, by Bonferroni over all directions of all modules."""


@dataclass(frozen=True, eq=False)
class ModuleSignal:
    """Gradient signal of one module by block of rows, each half measured along what the other one leads to.

    Parameters
    ----------
    projections : pair of arrays (block, direction)
        Gradients along the leading directions that the factors cannot follow.
    outside, inside : pair of arrays (block,)
        Inner products with the mean gradient of the other half, outside and inside what the factors can follow.
    """

    projections: tuple[Float[np.ndarray, "_ _"], ...]
    outside: tuple[Float[np.ndarray, "_"], ...]
    inside: tuple[Float[np.ndarray, "_"], ...]

    @property
    def signal(self) -> float:
        """Unbiased estimate of the squared norm of the expected gradient that the factors cannot follow."""
        return float(self.outside[0].mean())

    @property
    def reach(self) -> float:
        """Fraction of the signal that the factors can follow; NaN without a signal."""
        inside = float(self.inside[0].mean())
        if inside + self.signal <= 0:
            return math.nan
        # The estimate of a share may leave its range.
        return min(max(inside / (inside + self.signal), 0.0), 1.0)


def signal_p(halves: Sequence[Float[np.ndarray, "_"]]) -> float:
    """Return the p-value of a signal being above 0: the smaller one of both halves, by Bonferroni."""
    return min(1.0, 2 * min(t_estimate(values).p_above(0) for values in halves))


def total_inside(signals: Mapping[str, ModuleSignal]) -> list[Float[np.ndarray, "_"]]:
    """Return the signal inside what the factors of all modules can follow, by block, of both halves."""
    return [np.sum([signal.inside[half] for signal in signals.values()], axis=0) for half in (0, 1)]


def count_directions(signals: Mapping[str, ModuleSignal]) -> dict[str, int]:
    """Count the directions of every module that its factors cannot follow and that the loss asks for.

    A direction counts if its gradients are above 0 by a one-sided t-test over blocks, by Bonferroni over the directions
    of all modules. The directions of both halves are different vectors, so the smaller of the two counts is returned.
    """
    counts = dict.fromkeys(signals, np.iinfo(np.int64).max)
    for half in (0, 1):
        # A module of low rank has fewer directions than others.
        tests = sum(signal.projections[half].shape[1] for signal in signals.values())
        for module, signal in signals.items():
            p_values = [t_estimate(values).p_above(0) for values in signal.projections[half].T]
            counts[module] = min(counts[module], int(np.sum(np.array(p_values) * tests < FAMILY)))
    return counts


def smallest_signal(signals: Mapping[str, ModuleSignal]) -> float:
    """Return the squared gradient along a direction that would have been counted: the median over all directions."""
    tests = sum(signal.projections[0].shape[1] for signal in signals.values())
    sizes = []
    for signal in signals.values():
        sizes += [t_estimate(values).half_width(FAMILY / tests) for values in signal.projections[0].T]
    return float(np.median(sizes)) ** 2
