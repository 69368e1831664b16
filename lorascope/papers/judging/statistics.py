"""Statistics of claims: what is computed from the evidence for given seeds.

A statistic returns one value per seed, one per seed and test row, or one per pair of seeds; the claim says how its
interval is computed. Statistics can be negated, added, subtracted and divided, so that a row of a table of claims reads
like the quantity that it describes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import Estimate, jackknife_estimate, pseudo_values, t_estimate, two_way_estimate
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.kept_study import StudyEvidence

Method = Literal["t", "two-way", "jackknife", "published"]
COURSE = "course"
"""Kept table ``best_accuracy, epochs``, one row: of a network with one adapter that learns eight classes of points."""


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

    def __call__(self, evidence: Evidence | StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return np.array(self.value)


@dataclass(frozen=True)
class Simulated(Constant):
    """Statistic expected under chance, from a simulation, with its number of draws and its standard error."""

    draws: int
    error: float


@dataclass(frozen=True)
class Accuracy(Statistic):
    """Statistic of whether each test row is right: (seed, row)."""

    arm: str

    def reads(self) -> Reads:
        return {("margin", self.arm): ()}

    def __call__(self, evidence: Evidence | StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return np.stack([evidence.correct(self.arm, seed) for seed in seeds])


@dataclass(frozen=True)
class LogLikelihood(Statistic):
    """Statistic of the log-likelihood of each test row in nats, so that higher is better: (seed, row)."""

    arm: str

    def reads(self) -> Reads:
        return {("nll", self.arm): ()}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return -np.stack([evidence.losses(self.arm, seed) for seed in seeds])


@dataclass(frozen=True)
class MeanOverRows(Statistic):
    """Mean of a statistic over test rows: (seed,)."""

    of: Statistic

    def reads(self) -> Reads:
        return self.of.reads()

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return self.of(evidence, seeds).mean(axis=1)


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

    def __call__(self, evidence: Evidence | StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return np.array([self.value(evidence.table(self.table, self.arm, seed)) for seed in seeds], np.float64)


@dataclass(frozen=True)
class OfPairs(Statistic):
    """Statistic of each pair of runs with different seeds, of one or two arms, from a kept table each: (seed, seed)."""

    value: Callable[[pd.DataFrame, pd.DataFrame], float]
    table: str
    arm: str
    other: str

    def reads(self) -> Reads:
        return {(self.table, self.arm): (), (self.table, self.other): ()}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        first, second = ([evidence.table(self.table, arm, seed) for seed in seeds] for arm in (self.arm, self.other))
        values = np.full((len(seeds), len(seeds)), np.nan)
        for i, j in zip(*np.nonzero(~np.eye(len(seeds), dtype=bool)), strict=True):
            if self.arm == self.other and i > j:  # within an arm, a pair counts once
                values[i, j] = values[j, i]
            else:
                values[i, j] = self.value(first[i], second[j])
        return values


@dataclass(frozen=True)
class Combined(Statistic):
    """Function of the values of several statistics of the same shape; constants fit every shape."""

    function: Callable[..., Any]
    terms: tuple[Statistic, ...]

    def reads(self) -> Reads:
        return {key: other_arms for term in self.terms for key, other_arms in term.reads().items()}

    def __call__(self, evidence: Evidence | StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return np.asarray(self.function(*(term(evidence, seeds) for term in self.terms)))


def average(statistics: Iterable[Statistic]) -> Combined:
    """Return the mean of statistics of the same shape."""
    return Combined(lambda *values: sum(values) / len(values), tuple(statistics))


def by_seed(values: np.ndarray, seeds: int, method: Method) -> np.ndarray:
    """Reduce the values of a statistic to one per seed: means over rows, or pseudo-values of pairs.

    Raises
    ------
    ValueError
        The shape of the values does not fit the method, or a value is not finite.
    """
    if not values.ndim:  # a constant, which is the same for every seed
        return np.full(seeds, float(values))
    shape = {"t": (seeds,), "two-way": (seeds, values.shape[-1]), "jackknife": (seeds, seeds)}[method]
    if values.shape != shape:
        raise ValueError(f"values of a {method} interval must have shape {shape}, got {values.shape}")
    if method == "two-way":
        values = values.mean(axis=1)
    elif method == "jackknife":
        values = pseudo_values(values)
    if not np.isfinite(values).all():
        raise ValueError(f"values must be finite, got {values[~np.isfinite(values)][0]}")
    return values


def estimate_effect(
    statistic: Statistic, control: Statistic, evidence: Evidence, seeds: Sequence[int], method: Method
) -> tuple[Estimate, pd.DataFrame]:
    """Estimate statistic minus control over seeds.

    Returns
    -------
    Estimate
        Mean of the effect with its standard errors.
    DataFrame
        ``seed, statistic, control, effect``: one row per seed, for pairs of runs with pseudo-values.

    Raises
    ------
    ValueError
        Statistic and control have other shapes than the method needs, or a value is not finite.
    """
    measured, compared = statistic(evidence, seeds), control(evidence, seeds)
    values = pd.DataFrame({"seed": list(seeds)})
    values["statistic"] = by_seed(measured, len(seeds), method)
    values["control"] = by_seed(compared, len(seeds), method)
    values["effect"] = effects = values["statistic"] - values["control"]
    if method == "two-way":
        # All arms of a difference by row have the same rows, so the first one gives their clusters.
        arm = min(statistic.arms() | control.arms())
        return two_way_estimate(measured - compared, evidence.clusters(arm, seeds[0])), values
    estimate = t_estimate if method == "t" else jackknife_estimate
    return estimate(effects.to_numpy()), values
