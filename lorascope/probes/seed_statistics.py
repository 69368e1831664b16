"""Statistics of claims: one value per seed, computed from the runs of an arm, from pairs of runs, or from other ones.

A statistic is called with the data of its probe, by default the runs by label. Statistics can be negated, subtracted
and divided, so that a row of a table of claims reads like the quantity that it describes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorascope.runs.run import Run

Runs = Mapping[str, Sequence[Run]]
BySeed = dict[int, float]


class Statistic:
    """Quantity with one value per seed."""

    def __call__(self, data: Any) -> BySeed:
        """Compute the values from the data of the probe; empty if there are too few seeds."""
        raise NotImplementedError

    def __neg__(self) -> Combined:
        return Combined(operator.neg, (self,))

    def __sub__(self, other: Statistic | float) -> Combined:
        return Combined(operator.sub, (self, other))

    def __truediv__(self, other: float) -> Combined:
        return Combined(operator.truediv, (self, other))


@dataclass(frozen=True)
class EachRun(Statistic):
    """Value of each run of an arm."""

    value: Callable[[Run], float]
    arm: str

    def __call__(self, data: Runs) -> BySeed:
        return {run.seed: self.value(run) for run in data[self.arm]}


@dataclass(frozen=True)
class NextSeed(Statistic):
    """Value of each run of an arm and the run of another arm with the next seed; the last is paired with the first.

    There is no value for a single seed, because a pair never shares a seed. Each run enters two values, so they are not
    independent, although the t-interval assumes it. With two seeds, one value of a symmetric comparison counts twice.
    """

    value: Callable[[Run, Run], float]
    arm: str
    other: str

    def __call__(self, data: Runs) -> BySeed:
        pairs = pair_next_seeds(data[self.arm], data[self.other])
        return {first.seed: self.value(first, second) for first, second in pairs}


@dataclass(frozen=True)
class Combined(Statistic):
    """Function of the values of several statistics with the same seed; numbers are the same for every seed."""

    function: Callable[..., float]
    parts: tuple[Statistic | float, ...]

    def __call__(self, data: Any) -> BySeed:
        found = [part(data) if isinstance(part, Statistic) else part for part in self.parts]
        seeds = next(part for part in found if isinstance(part, dict))
        return {seed: self.function(*(of[seed] if isinstance(of, dict) else of for of in found)) for seed in seeds}


def average(parts: Iterable[Statistic]) -> Combined:
    """Return the mean of statistics over the same seeds."""
    return Combined(lambda *values: sum(values) / len(values), tuple(parts))


def accuracy(run: Run) -> float:
    """Return the test metric of a run."""
    return run.score.metric


def loss(run: Run) -> float:
    """Return the test loss of a run in nats."""
    return run.score.loss


def pair_next_seeds(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pair each run with the next seed's run of the other arm; the list is empty for a single seed."""
    return list(zip(first, [*second[1:], second[0]], strict=True)) if len(first) > 1 else []
