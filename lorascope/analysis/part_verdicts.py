"""Verdicts on the parts of an update from their effects: conditions, margins, and the rows that would decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from lorascope.analysis.paired_rows import LEVEL, add_estimates, rows_to_decide
from lorascope.analysis.seed_intervals import Estimate
from lorascope.array_types import Bool
from lorascope.files.lazy_scipy import false_discovery_control

FEWEST_PARTS = 10  # the even share of fewer parts would be too large a margin


class Effects(NamedTuple):
    """Effects of removing one part: learn and forget, positive if the part learns and if it forgets."""

    learn: Estimate
    forget: Estimate


def even_share(effect: float, number: int) -> float:
    """Return the margin of an axis: the even share of the whole update's effect among a number of parts, 10 or more."""
    return abs(effect) / max(number, FEWEST_PARTS)


def judge_parts(
    effects: Mapping[str, Effects], update: Effects, learn_margin: float, forget_margin: float
) -> list[str]:
    """Return the verdict of each part.

    Every condition is a one-sided test with error 2.5%, as the end of a 95% interval, with the false discovery rate
    controlled over the parts (Benjamini and Hochberg 1995).

    ============  ==========================  =================================================
    verdict       learn                       forget
    ============  ==========================  =================================================
    hurts         < -margin                   any
    keep          > 0                         at most in proportion to that of the whole
    only forgets  < margin                    > 0
    trade         > 0                         above that, by interval
    idle          < margin                    < margin, not above 0
    undecided     otherwise
    ============  ==========================  =================================================

    A condition further up precedes. If the whole update is not shown to learn, no part is worth keeping.
    """
    if not effects:
        return []
    learn, forget = zip(*effects.values(), strict=True)
    learns, forgets = _are_above(learn, 0), _are_above(forget, 0)
    is_small, is_quiet = _are_below(learn, learn_margin), _are_below(forget, forget_margin)
    hurts = _are_below(learn, -learn_margin)
    # Without learning there is no proportion, and every ratio would divide by noise.
    excess, costs = np.zeros(len(effects)), np.zeros(len(effects), bool)
    if update.learn.p_above(0) < LEVEL:
        ratio = update.forget.mean / update.learn.mean
        excesses = [add_estimates(effect.forget, effect.learn, -ratio) for effect in effects.values()]
        excess = np.array(list(map(attrgetter("mean"), excesses)))
        costs = _are_above(excesses, 0)
    else:
        learns = np.zeros(len(effects), bool)
    conditions = {
        "hurts": hurts,
        "keep": learns & (excess <= 0),
        # Rows may show a learn of any size, also one far below the margin.
        "only forgets": is_small & forgets,
        "trade": learns & costs,
        "idle": is_small & is_quiet & ~forgets,
    }
    return np.select(list(conditions.values()), list(conditions), "undecided").tolist()


def _are_above(estimates: Sequence[Estimate], bound: float) -> Bool[np.ndarray, "part"]:
    return _reject([estimate.p_above(bound) for estimate in estimates])


def _are_below(estimates: Sequence[Estimate], bound: float) -> Bool[np.ndarray, "part"]:
    return _reject([estimate.p_below(bound) for estimate in estimates])


def _reject(p_values: Sequence[float]) -> Bool[np.ndarray, "part"]:
    # Rounding may take a p-value beyond its range, which scipy rejects.
    return false_discovery_control(np.clip(p_values, 0, 1)) < LEVEL


def rows_needed(effects: Effects, update: Effects, learn_margin: float, forget_margin: float, rows: int) -> float:
    """Return the number of rows that would decide an undecided part, if its effects and their spread stay."""
    if effects.learn.p_above(0) < LEVEL:  # what is open is whether it forgets more than in proportion
        excess = add_estimates(effects.forget, effects.learn, -update.forget.mean / update.learn.mean)
        return _ceil(rows_to_decide(excess, 0.0, rows))
    numbers = []
    for estimate, margin in ((effects.learn, learn_margin), (effects.forget, forget_margin)):
        # A verdict needs one end of the interval on either axis: beyond 0 or below the margin.
        numbers.append(min(rows_to_decide(estimate, 0.0, rows), rows_to_decide(estimate, margin, rows)))
    return _ceil(max(numbers))


def _ceil(number: float) -> float:
    if math.isinf(number):
        return number
    return math.ceil(number)
