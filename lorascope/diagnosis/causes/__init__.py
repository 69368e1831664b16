"""Checks for reasons why an adapter or a run is not as intended: one small function each, from tables to findings.

A check relies only on evidence, a number compared with a threshold. The thresholds are at the top of each file, with
their reasons. A folder does not show whether a choice was intended, so a check reports nothing if a mistake and a
choice give the same numbers.
"""

from __future__ import annotations

from lorascope.diagnosis.causes.config import (
    find_allocator_excess,
    find_overscaled_updates,
    find_tied_twice,
    find_uneven_scale,
    find_unmatched_keys,
)
from lorascope.diagnosis.causes.evidence import Case, Cause, Finding
from lorascope.diagnosis.causes.factors import (
    find_collapsed,
    find_dead,
    find_frozen,
    find_not_a_number,
    find_scale_zero,
    find_untrained,
)
from lorascope.diagnosis.causes.training import find_diverged, find_leaked, find_rate_small, find_unused

__all__ = ["CAUSES", "Case", "Cause", "Finding"]

CAUSES = (
    Cause(("nan",), find_not_a_number, suppresses=("diverged", "overscaled", "rate-small", "dead", "collapsed")),
    Cause(("scale-zero",), find_scale_zero, suppresses=("unused", "untrained")),
    Cause(("untrained",), find_untrained),
    Cause(("unused",), find_unused, "history"),
    Cause(("dead",), find_dead, suppresses=("unused", "untrained")),
    Cause(("frozen",), find_frozen),
    Cause(("unmatched",), find_unmatched_keys),
    Cause(("overscaled",), find_overscaled_updates, "weights", ("diverged",)),
    Cause(("uneven-scale",), find_uneven_scale),
    Cause(("allocator-idle", "budget-missed"), find_allocator_excess),
    Cause(("rate-small",), find_rate_small, "weights"),
    Cause(("diverged",), find_diverged, "history"),
    Cause(("collapsed",), find_collapsed),
    Cause(("tied-twice",), find_tied_twice, "base"),
    Cause(("leak",), find_leaked, "history"),
)
