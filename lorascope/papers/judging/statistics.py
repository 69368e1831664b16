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

Method = Literal["t", "two-way", "jackknife", "published"]
COURSE = "course"
"""Kept table ``best_accuracy, epochs``, one row: of a network with one adapter that learns eight classes of points."""


class Statistic:
    """Quantity that is computed from the evidence for some seeds."""

    def arms(self) -> set[str]:
        """Return the labels of the arms whose runs it reads."""
        raise NotImplementedError

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Return the kept tables and scores that it reads: name and arm -> other arms that a table is computed from.

        The names of scores are "margin" and "nll".
        """
        return {}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
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
    """A value that is known without runs, such as an exact expectation under chance."""

    value: float

    def arms(self) -> set[str]:
        return set()

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return np.array(self.value)


@dataclass(frozen=True)
class Simulated(Constant):
    """An expectation under chance from a simulation, with its number of draws and its standard error."""

    draws: int
    error: float


@dataclass(frozen=True)
class Accuracy(Statistic):
    """Whether each test row is right: (seed, row)."""

    arm: str

    def arms(self) -> set[str]:
        return {self.arm}

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {("margin", self.arm): ()}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return np.stack([evidence.correct(self.arm, seed) for seed in seeds])


@dataclass(frozen=True)
class LogLikelihood(Statistic):
    """Log-likelihood of each test row in nats, so that higher is better: (seed, row)."""

    arm: str

    def arms(self) -> set[str]:
        return {self.arm}

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {("nll", self.arm): ()}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return -np.stack([evidence.losses(self.arm, seed) for seed in seeds])


@dataclass(frozen=True)
class MeanOverRows(Statistic):
    """Mean over test rows: (seed,)."""

    of: Statistic

    def arms(self) -> set[str]:
        return self.of.arms()

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return self.of.reads()

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return self.of(evidence, seeds).mean(axis=1)


@dataclass(frozen=True)
class OfRun(Statistic):
    """Value of each run of an arm, from one of its kept tables: (seed,).

    A table that is computed from several runs of a seed belongs to one of them; ``others`` are the arms of the rest.
    """

    value: Callable[[pd.DataFrame], float]
    table: str
    arm: str
    others: tuple[str, ...] = ()

    def arms(self) -> set[str]:
        return {self.arm, *self.others}

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {(self.table, self.arm): self.others}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return np.array([self.value(evidence.table(self.table, self.arm, seed)) for seed in seeds], np.float64)


@dataclass(frozen=True)
class OfPairs(Statistic):
    """Value of each pair of runs with different seeds, of one or two arms, from a kept table of each: (seed, seed)."""

    value: Callable[[pd.DataFrame, pd.DataFrame], float]
    table: str
    arm: str
    other: str

    def arms(self) -> set[str]:
        return {self.arm, self.other}

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {(self.table, arm): () for arm in (self.arm, self.other)}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        first, second = ([evidence.table(self.table, arm, seed) for seed in seeds] for arm in (self.arm, self.other))
        found = np.full((len(seeds), len(seeds)), np.nan)
        for i, j in zip(*np.nonzero(~np.eye(len(seeds), dtype=bool)), strict=True):
            if self.arm == self.other and i > j:  # within an arm, a pair counts once
                found[i, j] = found[j, i]
            else:
                found[i, j] = self.value(first[i], second[j])
        return found


@dataclass(frozen=True)
class Combined(Statistic):
    """Function of the values of several statistics of the same shape; constants fit every shape."""

    function: Callable[..., Any]
    parts: tuple[Statistic, ...]

    def arms(self) -> set[str]:
        return set().union(*(part.arms() for part in self.parts))

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {key: others for part in self.parts for key, others in part.reads().items()}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return np.asarray(self.function(*(part(evidence, seeds) for part in self.parts)))


def average(parts: Iterable[Statistic]) -> Combined:
    """Return the mean of statistics of the same shape."""
    return Combined(lambda *values: sum(values) / len(values), tuple(parts))


def by_seed(values: np.ndarray, seeds: int, method: Method) -> np.ndarray:
    """Reduce the values of a statistic to one per seed: means over rows, or pseudo-values of pairs.

    Raises
    ------
    ValueError
        The shape of the values does not fit the method, or a value is not finite.
    """
    if not values.ndim:
        return np.full(seeds, float(values))
    shape = {"t": (seeds,), "two-way": (seeds, values.shape[-1]), "jackknife": (seeds, seeds)}[method]
    if values.shape != shape:
        raise ValueError(f"values of a {method} interval must have shape {shape}, got {values.shape}")
    reduced = {"t": lambda: values, "two-way": lambda: values.mean(axis=1), "jackknife": lambda: pseudo_values(values)}
    found = reduced[method]()
    if not np.isfinite(found).all():
        raise ValueError(f"values must be finite, got {found[~np.isfinite(found)][0]}")
    return found


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
    found, compared = statistic(evidence, seeds), control(evidence, seeds)
    values = pd.DataFrame(
        {
            "seed": list(seeds),
            "statistic": by_seed(found, len(seeds), method),
            "control": by_seed(compared, len(seeds), method),
        }
    )
    values["effect"] = values["statistic"] - values["control"]
    if method == "two-way":
        arm = min(statistic.arms() | control.arms())
        return two_way_estimate(found - compared, evidence.clusters(arm, seeds[0])), values
    effects = values["effect"].to_numpy()
    return (t_estimate if method == "t" else jackknife_estimate)(effects), values
