"""Statistics of claims: what is computed from the evidence for given seeds.

A statistic returns one value per seed, one per seed and test row, or one per pair of seeds. Statistics can be negated,
added, subtracted and divided, so that a row of a table of claims reads like the quantity that it describes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lorascope.papers.judging.kept_study import StudyEvidence

Reads = dict[tuple[str, str], tuple[str, ...]]
"""Kept tables and scores by name and arm, with the other arms that a table is computed from."""


class Statistic:
    """Statistic: quantity that is computed from the evidence for some seeds."""

    def reads(self) -> Reads:
        """Return the kept tables and scores that it reads; the names of scores are "margin" and "nll"."""
        return {}

    def arms(self) -> set[str]:
        """Return the labels of the arms whose runs it reads."""
        return {label for (_, arm), other_arms in self.reads().items() for label in (arm, *other_arms)}

    def __call__(self, evidence: Any, seeds: Sequence[int]) -> np.ndarray:
        """Compute the values: an array (seed,), (seed, row) or (seed, seed)."""
        raise NotImplementedError

    def __neg__(self) -> Combined:
        return Combined(operator.neg, (self,))

    def __add__(self, other: Statistic) -> Combined:
        return Combined(operator.add, (self, other))

    def __sub__(self, other: Statistic) -> Combined:
        return Combined(operator.sub, (self, other))

    def __truediv__(self, other: float) -> Combined:
        return Combined(operator.truediv, (self, Constant(other)))


@dataclass(frozen=True)
class Constant(Statistic):
    """Statistic that is known without runs, such as an exact expectation under chance."""

    value: float

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return np.array(self.value)


@dataclass(frozen=True)
class Accuracy(Statistic):
    """Statistic of whether each test row is right: (seed, row)."""

    arm: str

    def reads(self) -> Reads:
        return {("margin", self.arm): ()}

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return np.stack([evidence.correct(self.arm, seed) for seed in seeds])


@dataclass(frozen=True)
class OfRun(Statistic):
    """Statistic of each run of an arm, from one of its kept tables: (seed,).

    A table that is computed from several runs of a seed belongs to one of them; ``other_arms`` have the others.
    """

    value: Callable[[pd.DataFrame], float]
    table: str
    arm: str
    other_arms: tuple[str, ...] = ()

    def reads(self) -> Reads:
        return {(self.table, self.arm): self.other_arms}

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return np.array([self.value(evidence.table(self.table, self.arm, seed)) for seed in seeds], np.float64)


@dataclass(frozen=True)
class Combined(Statistic):
    """Function of the values of several statistics of the same shape; constants fit every shape."""

    function: Callable[..., Any]
    terms: tuple[Statistic, ...]

    def reads(self) -> Reads:
        return {key: other_arms for term in self.terms for key, other_arms in term.reads().items()}

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return np.asarray(self.function(*(term(evidence, seeds) for term in self.terms)))


def average(statistics: Iterable[Statistic]) -> Combined:
    """Return the mean of statistics of the same shape."""
    return Combined(lambda *values: sum(values) / len(values), tuple(statistics))
