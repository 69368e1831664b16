"""Statistics of the second edition: gap closed, loss, accuracy and values of tables, and the comparisons of claims.

Effects are in points: of the gap, of accuracy, of neurons or of factors, and in percent on the quadratic. A claim is a
``Comparison`` of statistics that are method minus control already, with one value per seed (or per seed and test row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import CONFIDENCE, Interval, t_estimate, two_way_estimate
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.statistics import Accuracy, Combined, Constant, OfRun, Reads, Statistic, average

__all__ = [
    "Accuracy", "Combined", "Comparison", "Constant", "GapClosed", "LogLoss", "OfTable", "Statistic", "StudyComparison",
    "are_learned", "average", "effect_interval", "pair", "seed_effects",
]  # fmt: skip

MIN_CLOSED = 20.0  # points of the gap
MIN_ABOVE_MAJORITY = 10.0  # points of accuracy
MAX_LOSS_FRACTION = 0.2  # of the first loss
OfTable = OfRun
"""``OfTable(function, name, arm)``: a number that a function computes from a table of each run."""


@dataclass(frozen=True)
class GapClosed(Statistic):
    """Statistic of the gap to the teacher that an arm closes, in points, averaged over tasks: (seed,)."""

    arm: str

    def reads(self) -> Reads:
        return {("gap", self.arm): ()}

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return np.array([evidence.closed(self.arm, seed) for seed in seeds])


@dataclass(frozen=True)
class LogLoss(Statistic):
    """Statistic of -100 ln(final loss), so that a difference is in percent and higher is better: (seed,)."""

    arm: str

    def reads(self) -> Reads:
        return {("loss", self.arm): ()}

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return -100 * np.log([evidence.final_loss(self.arm, seed) for seed in seeds])


@dataclass(frozen=True)
class StudyComparison:
    """Effects of a claim, each of them method minus control.

    Parameters
    ----------
    effect : Statistic
        Effect at the truth that favors the method, or the only effect.
    against : Statistic or None
        Effect at the truth that does not favor it.
    positive : Statistic or None
        Effect that must be above 0 (for a cost claim: below 0), or else the claim has no headroom.
    """

    effect: Statistic
    against: Statistic | None = None
    positive: Statistic | None = None

    def statistics(self) -> dict[str, Statistic]:
        """Return the statistics by name: "for", "against" and "positive", as far as there are any."""
        by_name = {"for": self.effect, "against": self.against, "positive": self.positive}
        return {name: statistic for name, statistic in by_name.items() if statistic is not None}

    def arms(self) -> set[str]:
        """Return the labels of all arms that it reads."""
        return set().union(*(statistic.arms() for statistic in self.statistics().values()))


Comparison = StudyComparison


def pair(
    method: str,
    control: str,
    positive: str | None = None,
    positive_control: str | None = None,
    *,
    truths: tuple[str, str],
    positive_truth: str | None = None,
    of: Callable[[str], Statistic] = GapClosed,
) -> StudyComparison:
    """Return the comparison of a pair of planted truths.

    Parameters
    ----------
    method, control : str
        Arms without their truth: the label of an arm is ``"ARM, TRUTH"``.
    positive : str or None
        Positive control, without its truth; None if the claim needs none.
    positive_control : str or None
        What the positive control is compared with; None for ``control``.
    truths : (str, str)
        Truth that favors the method, and the other one.
    positive_truth : str or None
        Truth of the positive control; None for the favorable one.
    of : callable
        Statistic of an arm. Default ``GapClosed``.
    """
    favorable, other = truths

    def difference(first: str, second: str, truth: str) -> Statistic:
        return of(f"{first}, {truth}") - of(f"{second}, {truth}")

    shown_by = None
    if positive is not None:
        shown_by = difference(positive, positive_control or control, positive_truth or favorable)
    return StudyComparison(difference(method, control, favorable), difference(method, control, other), shown_by)


def are_learned(rows: pd.DataFrame) -> pd.Series:
    """Return for each row of ``runs`` (a phase and a task of a run) whether it learned.

    It must close 20 points of the gap, or be 10 points above the most frequent class, or reach a fifth of its first
    loss. A row without any of these values did not learn.
    """
    closed = 100 * (1 - rows["gap"] / rows["base_gap"])
    above_majority = 100 * (rows["accuracy"] - rows["majority"])
    # A comparison with NaN is false.
    is_low = rows["loss"] < MAX_LOSS_FRACTION * rows["first_loss"]
    return (closed >= MIN_CLOSED) | (above_majority >= MIN_ABOVE_MAJORITY) | is_low


def effect_interval(values: np.ndarray, clusters: np.ndarray | None = None) -> Interval:
    """Compute the mean and the 95% interval of an effect: over seeds, or over seeds and clusters of test rows.

    Parameters
    ----------
    values : array (seed,) or (seed, row)
        Method minus control.
    clusters : array (row,), optional
        Cluster of each test row, numbered from 0; needed for values by row.
    """
    level = (1 - CONFIDENCE) / 2
    if values.ndim == 1:
        return t_estimate(values).interval(level)
    if clusters is None:
        raise ValueError("clusters must be given for values by test row, got None")
    return two_way_estimate(values, clusters).interval(level)


def seed_effects(values: np.ndarray) -> np.ndarray:
    """Return one effect per seed: the values themselves, or their means over test rows."""
    return values if values.ndim == 1 else values.mean(axis=1)
