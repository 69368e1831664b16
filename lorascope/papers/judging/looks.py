"""Looks: numbers of seeds at which a claim is judged, with a share of the error for each.

A claim ends at the first look that decides it, and keeps the verdict of that look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorascope.analysis.seed_intervals import Estimate, Interval
from lorascope.papers.judging.claims import Claim, Outcome, side

ERROR = 0.025
"""One-sided error of a claim over all its looks."""
STOPPED = "more seeds to train"
BUDGET = 2400
"""CPU-minutes of all runs after which none is trained."""


@dataclass(frozen=True)
class Looks:
    """Looks at which a claim is judged: their numbers of seeds, and their one-sided levels.

    Parameters
    ----------
    seeds : tuple of int
        Number of seeds of the looks, increasing.
    levels : tuple of float
        One-sided levels of the looks. Their error over all looks together is at most ``ERROR``.

    Raises
    ------
    ValueError
        It is neither an allowed design nor a single look at the level ``ERROR``.
    """

    seeds: tuple[int, ...]
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if (self.seeds, self.levels) not in _ALLOWED and not (len(self.seeds) == 1 and self.levels == (ERROR,)):
            allowed = "; ".join(f"{list(seeds)} at {list(levels)}" for seeds, levels in _ALLOWED)
            raise ValueError(
                f"looks must be {allowed}, or one look at [{ERROR}], got {list(self.seeds)} at {list(self.levels)}"
            )


# A simulation of each design gives a one-sided error of 0.0242 and 0.0248 over all looks together.
_ALLOWED = [((5, 10, 20), (0.005, 0.0075, 0.015)), ((5, 10), (0.005, 0.0215))]


@dataclass(frozen=True)
class Verdict:
    """Outcome of a claim at its looks: at the one that decided it, or at the last one so far.

    Parameters
    ----------
    outcome : {"supported", "not supported", "inconclusive", "void"}
        Result of the rule of the claim.
    look : int
        Number of the look, from 1.
    level : float
        One-sided level of the look; the interval has an error of ``level`` at each end.
    effect : Interval
        Effect with its interval and the number of seeds.
    half_seed : float
        Half width of the interval over seeds.
    half_row : float
        Half width of the interval over test rows, NaN where rows are not samples.
    degrees : float
        Degrees of freedom of the effect's standard error.
    side : str
        "above 0" or "below 0" if the whole interval is there, else "".
    p, p_looks : float
        p-value at the look, and the same multiplied by the share of the error that the look has.
    note : str
        "more seeds to train" if the claim is undecided and has looks left, else "".
    """

    outcome: Outcome
    look: int
    level: float
    effect: Interval
    half_seed: float
    half_row: float
    degrees: float
    side: str
    p: float
    p_looks: float
    note: str


def judge_at_looks(claim: Claim, looks: Looks, estimate: Callable[[int], Estimate], available: int) -> Verdict:
    """Judge a claim at its looks, in order, until one decides it or the seeds do not suffice for the next.

    Parameters
    ----------
    claim : Claim
        Claim to judge.
    looks : Looks
        Its looks.
    estimate : callable
        ``estimate(n)`` returns the estimate of the effect from the first n seeds.
    available : int
        Number of seeds that both statistic and control have, enough for the first look. Seeds after the look at which
        the claim ends are not read.

    Returns
    -------
    Verdict
        Verdict of the deciding look, or of the last one that the seeds allow.
    """
    reached = [n for n in looks.seeds if n <= available]
    # There are fewer reached looks than levels as long as seeds are missing.
    for look, (n, level) in enumerate(zip(reached, looks.levels, strict=False), start=1):
        effect = estimate(n)
        outcome = claim.outcome(effect, level)
        if outcome != "inconclusive" or look == len(looks.seeds):
            return _verdict(claim, outcome, look, level, effect, "")
    return _verdict(claim, "inconclusive", look, level, effect, STOPPED)


def _verdict(claim: Claim, outcome: Outcome, look: int, level: float, effect: Estimate, note: str) -> Verdict:
    # The last error is the one over seeds.
    seeds, rows = (Estimate(effect.mean, effect.n, errors) for errors in (effect.errors[-1:], effect.rows))
    interval, p = effect.interval(level), claim.p(effect)
    return Verdict(
        outcome=outcome,
        look=look,
        level=level,
        effect=interval,
        half_seed=seeds.half_width(level),
        half_row=rows.half_width(level),
        degrees=effect.errors[0][1],
        side=side(interval.low, interval.high),
        p=p,
        p_looks=min(1.0, p * ERROR / level),
        note=note,
    )
