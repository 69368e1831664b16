"""Choice of learning rates and of numbers of seeds of the second edition, from the tuning runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorascope.files.lazy_scipy import stdtrit
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.study_statistics import StudyComparison, are_learned

TUNING_SEEDS = (9001, 9002, 9003)
MAX_ADDED_RATES = 3
NUMBERS_OF_SEEDS = (16, 24, 32, 40)  # the last one even if it does not suffice
_SAFETY = 1.5  # the standard deviation of three seeds is uncertain


class RateScore(NamedTuple):
    """Validation of an arm at a rate: mean gap (or loss, on text), and whether every seed learned."""

    gap: float
    learned: bool


class RateChoice(NamedTuple):
    """State of the choice of a rate: rates that must be trained before anything can be chosen, or the chosen rate.

    Without a missing rate, ``rate`` is None if no rate is safe. ``at_end`` is true if the chosen rate is the lowest or
    highest that was tried, even after the added ones.
    """

    missing: tuple[float, ...]
    rate: float | None = None
    at_end: bool = False


def grid_rate(rate: float, steps: int) -> float:
    """Return the rate that is some steps above (or below) a rate in the grid 1, 1.8, 3.2, 5.6, 10, ... times 1e-3."""
    position = round(4 * math.log10(rate)) + steps
    return float(f"{10 ** (position / 4):.1e}")


def choose_safe_rate(rates: Sequence[float], scores: Mapping[float, RateScore]) -> RateChoice:
    """Choose the safe rate with the lowest mean validation gap.

    A rate is safe if all seeds learn at it and at the next higher rate. If the best one is the lowest or highest that
    was tried, one more is tried beyond it, three times at most; without a safe rate, a lower one is tried.

    Parameters
    ----------
    rates : sequence of float
        Rates that are tried first, increasing. A single one is chosen without scores.
    scores : mapping rate -> RateScore
        Validation at the rates that all tuning seeds have trained.
    """
    if len(rates) == 1:
        return RateChoice((), rates[0])
    # Trained rates that only decide whether a lower one is safe are not among the tried ones.
    tried = list(rates)
    for added in range(MAX_ADDED_RATES + 1):
        if missing := tuple(rate for rate in tried if rate not in scores):
            return RateChoice(missing)
        best = None
        for rate in sorted(tried, key=lambda rate: (scores[rate].gap, rate)):
            above = grid_rate(rate, 1)
            # Only a rate that could be chosen needs the next higher one.
            if scores[rate].learned and above not in scores:
                return RateChoice((above,))
            if scores[rate].learned and scores[above].learned:
                best = rate
                break
        # Without a safe rate, a lower one may be safe.
        is_end = best in (None, tried[0], tried[-1])
        if not is_end or added == MAX_ADDED_RATES:
            break
        if best == tried[-1]:
            tried.append(grid_rate(tried[-1], 1))
        else:
            tried.insert(0, grid_rate(tried[0], -1))
    return RateChoice((), best, is_end)


def tuning_scores(runs: pd.DataFrame, arm: str) -> dict[float, RateScore]:
    """Return the validation of an arm at each rate that all tuning seeds have trained, from the rows of the runs."""
    rows = runs[(runs["arm"] == arm) & (runs["role"] == "tuning") & runs["seed"].isin(TUNING_SEEDS)]
    scores = {}
    for rate, of_rate in rows.groupby("rate"):
        if set(of_rate["seed"]) == set(TUNING_SEEDS):
            # All phases must learn, but only the last one is compared.
            last = of_rate[of_rate["phase"] == ""]
            # A seed that diverged has no number, and makes its rate the worst.
            gap = float(last["gap"].fillna(last["loss"]).fillna(math.inf).mean())
            scores[float(str(rate))] = RateScore(gap, bool(are_learned(of_rate).all()))
    return scores


def chosen_rates(registration: StudyRegistration, runs: pd.DataFrame) -> dict[str, RateChoice]:
    """Return the state of the choice of every registered arm; an arm with ``rate_of`` has that of the other arm."""
    choices = {}
    for label, arm in registration.arms.items():
        tuned = registration.arms[arm.rate_of or label]
        choices[label] = choose_safe_rate(tuned.rates, tuning_scores(runs, tuned.label))
    return choices


def rate_table(registration: StudyRegistration, runs: pd.DataFrame) -> pd.DataFrame:
    """Tabulate ``arm, rate, gap, learned, chosen, at_end``: one row per arm and rate that was tuned."""
    rows = []
    for label, choice in chosen_rates(registration, runs).items():
        for rate, score in tuning_scores(runs, label).items():
            is_chosen = rate == choice.rate
            rows.append((label, rate, *score, is_chosen, is_chosen and choice.at_end))
    return pd.DataFrame(rows, columns=["arm", "rate", "gap", "learned", "chosen", "at_end"])


def tuned_evidence(evidence: StudyEvidence, rates: Mapping[str, float | None]) -> StudyEvidence:
    """Return the tuning runs of arms at the given rates, as if they were judged, so that effects can be computed."""
    runs = evidence.runs
    is_chosen = (runs["role"] == "tuning") & (runs["rate"] == runs["arm"].map(rates))
    return replace(evidence, runs=runs[is_chosen].assign(role="judged"))


def planned_seeds(
    registration: StudyRegistration, comparisons: Mapping[str, StudyComparison], evidence: StudyEvidence
) -> dict[str, int]:
    """Return the number of seeds of each claim, from its effect in the tuning runs at the chosen rates.

    Claims without tuning runs of all arms of their effect are left out: their number of seeds is planned otherwise.
    """
    rates = {label: choice.rate for label, choice in chosen_rates(registration, evidence.runs).items()}
    tuned, numbers = tuned_evidence(evidence, rates), {}
    for id, claim in registration.claims.items():
        effect = comparisons[id].effect
        # A table that was not kept for tuning has no effect.
        names = {name for name, _ in effect.reads()} - {"gap", "loss"}
        if names <= tuned.tables.keys() and all(tuned.has(*key) for key in product(effect.arms(), TUNING_SEEDS)):
            numbers[id] = number_of_seeds(effect(tuned, TUNING_SEEDS), claim.rule.bound)
    return numbers


def number_of_seeds(effects: Sequence[float] | np.ndarray, bound: float) -> int:
    """Return the smallest number of seeds whose expected half width is below half the bound, or else the largest.

    Parameters
    ----------
    effects : sequence of float
        Effects of the tuning seeds at the chosen rates.
    bound : float
        Bound of the claim.
    """
    deviation = _SAFETY * float(np.std(effects, ddof=1))
    for seeds in NUMBERS_OF_SEEDS:
        half_width = float(stdtrit(seeds - 1, 0.975)) * deviation / math.sqrt(seeds)
        if half_width < bound / 2:
            return seeds
    return NUMBERS_OF_SEEDS[-1]
