"""Words of the second edition's claims, as functions of their 95% intervals.

A *gain* claim has the smallest gain m that matters, a *cost* claim the largest acceptable cost d; either is its bound.
"""

from __future__ import annotations

import math
from typing import Literal

RuleKind = Literal["gain", "cost"]
NOT_RUN, NOT_LEARNED, NO_HEADROOM = "not run", "not learned", "no headroom"
"""Words of claims that are not judged by their interval."""


def word(kind: RuleKind, bound: float, low: float, high: float) -> str:
    """Judge a claim by the interval of its effect.

    A gain claim is a "gain" if low > 0, "no gain" if high < m, "gain below m" if both, a "loss" if high < 0. A cost
    claim has "no cost" if low > -d, a "cost" if high < 0, a "cost below d" if both. Otherwise it is "open".
    """
    if kind == "gain":
        # First, because a loss is below m as well.
        if high < 0:
            return "loss"
        words = {(True, False): "gain", (False, True): "no gain", (True, True): "gain below m"}
        return words.get((low > 0, high < bound), "open")
    words = {(True, False): "no cost", (False, True): "cost", (True, True): "cost below d"}
    return words.get((low > -bound, high < 0), "open")


def pair_word(word_for: str, difference_low: float) -> str:
    """Judge a pair by the word at the favorable truth and the difference between the effects at its two truths.

    It is "as claimed" if there is a gain (no cost) and the difference is above 0, "not only there" if it is not,
    and "not even there" if there is no gain or a loss (a cost). Other words, "gain below m" and "cost below d"
    included, decide neither, and are returned as they are.
    """
    if word_for in ("no gain", "loss", "cost"):
        return "not even there"
    if word_for not in ("gain", "no cost"):
        return word_for
    return "as claimed" if difference_low > 0 else "not only there"


def has_headroom(kind: RuleKind, low: float, high: float) -> bool:
    """Return whether the interval of the positive control shows a gain, or a cost for a cost claim."""
    return low > 0 if kind == "gain" else high < 0


def excludes(value: float, low: float, high: float) -> str:
    """Return "yes" if a value is outside of an interval, "no" if it is inside, and "" without an interval."""
    if math.isnan(low):
        return ""
    return "no" if low <= value <= high else "yes"
