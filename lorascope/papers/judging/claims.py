"""Claims and the rule that judges them.

A claim compares a statistic with a control, in which the claimed cause is absent. The effect is statistic minus
control. The kind of the claim says what the effect must exceed or stay within; its margin or tolerance, which is fixed
before the runs, says by how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lorascope.analysis.seed_intervals import Estimate

MINIMUM_SEEDS = 3  # a t-interval of two seeds reaches 12.7 standard errors to each side
Kind = Literal["superiority", "non-inferiority", "equivalence"]
Outcome = Literal["supported", "not supported", "inconclusive", "void"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and the bound that judges it.

    With [low, high] the interval of the effect, a claim is

    - of superiority by a margin m: supported if low > m, not supported if high < m;
    - of non-inferiority within a tolerance d: supported if low > -d, not supported if high < -d;
    - of equivalence within a tolerance d: supported if low > -d and high < d, not supported if low > d or high < -d.

    Everything else is inconclusive.

    Parameters
    ----------
    id : str
        Name of the claim, such as "lora.parity".
    kind : {"superiority", "non-inferiority", "equivalence"}
        Rule that judges it.
    margin, tolerance : float or None
        Bound of the kind, > 0, in the unit of the statistic: a margin for superiority, else a tolerance.

    Raises
    ------
    ValueError
        The kind is unknown, its bound is missing or not a finite number > 0, or the other bound is given.
    """

    id: str
    kind: str
    margin: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        kinds = {"superiority": "margin", "non-inferiority": "tolerance", "equivalence": "tolerance"}
        if self.kind not in kinds:
            raise ValueError(f"kind must be one of {', '.join(kinds)}, got {self.kind!r}: claim {self.id}")
        name = kinds[self.kind]
        other = "tolerance" if name == "margin" else "margin"
        if getattr(self, other) is not None:
            raise ValueError(f"{other} must be left out of a claim of {self.kind}, which has a {name}: claim {self.id}")
        bound = getattr(self, name)
        if bound is None or not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"{name} must be a finite number > 0, got {bound}: claim {self.id}")

    @property
    def bound(self) -> float:
        """Margin or tolerance, > 0."""
        # Exactly one of them is given. The NaN is for the type checker only.
        return self.margin if self.margin is not None else self.tolerance or math.nan

    def decide(self, low: float, high: float) -> Outcome:
        """Judge the claim by the interval of its effect."""
        bound = self.bound
        if self.kind == "superiority":
            supported, rejected = low > bound, high < bound
        elif self.kind == "non-inferiority":
            supported, rejected = low > -bound, high < -bound
        else:
            supported, rejected = low > -bound and high < bound, low > bound or high < -bound
        if supported:
            return "supported"
        return "not supported" if rejected else "inconclusive"

    def outcome(self, effect: Estimate, level: float) -> Outcome:
        """Judge the claim at a one-sided level; fewer than ``MINIMUM_SEEDS`` seeds are always inconclusive."""
        _, low, high, n = effect.interval(level)
        return self.decide(low, high) if n >= MINIMUM_SEEDS else "inconclusive"

    def p(self, effect: Estimate) -> float:
        """Return twice the smaller one-sided p-value of "supported" and "not supported", at most 1."""
        bound = self.bound
        if self.kind == "equivalence":
            # Two one-sided tests: equivalence must pass both, and fails with either.
            supported = max(effect.p_above(-bound), effect.p_below(bound))
            rejected = min(effect.p_above(bound), effect.p_below(-bound))
        else:
            limit = bound if self.kind == "superiority" else -bound
            supported, rejected = effect.p_above(limit), effect.p_below(limit)
        return min(1.0, 2 * min(supported, rejected))


def side(low: float, high: float) -> str:
    """Return the side of 0 on which a claim's whole interval is: "above 0", "below 0", or "" if it contains 0."""
    if low > 0:
        return "above 0"
    return "below 0" if high < 0 else ""


def format_effect(claim: Claim, effect: float, low: float, high: float) -> str:
    """Format the effect that a claim is about and its interval, such as ``0.0112 [0.0041, 0.0183]``.

    There are at least three significant digits, and as many as it takes to see on which side of 0 and of the bounds of
    the claim each end is.
    """
    if math.isnan(low):
        return f"{_format_digits(effect, 3)} [no interval]"
    bounds = np.array([0.0, claim.bound, -claim.bound])
    for digits in range(3, 17):  # a float64 has about 16 significant digits
        text, low_text, high_text = (_format_digits(value, digits) for value in (effect, low, high))
        printed, exact = np.array([[float(low_text)], [float(high_text)]]), np.array([[low], [high]])
        if np.array_equal(np.sign(printed - bounds), np.sign(exact - bounds), equal_nan=True):
            break
    return f"{text} [{low_text}, {high_text}]"


def with_level(effect: str, one_sided: float) -> str:
    """Add the level of its interval to a claim's effect, such as ``0.0112 [0.0041, 0.0183] (99%)``.

    ``one_sided`` is the error of the interval on each side. An effect without a known one stays as it is.
    """
    return effect if not effect or math.isnan(one_sided) else f"{effect} ({100 * (1 - 2 * one_sided):.3g}%)"


def _format_digits(value: float, digits: int) -> str:
    """Format a number with these significant digits, including zeros at the end, and with all before the point."""
    text = f"{value:#.{digits}g}"
    # A large number would be printed with an exponent, and an integer with a point at its end.
    return f"{value:.0f}" if "e+" in text else text.removesuffix(".")
