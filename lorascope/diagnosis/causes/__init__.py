"""Causes why an adapter or a run is not what was meant: one small function each, from tables to findings.

A cause is told by evidence alone, a number beside the threshold that it crosses; every threshold stands at the head
of its file, with the reason for it. What was a choice rather than a mistake cannot be read off a folder, so where both
give the same numbers nothing is said.
"""

from __future__ import annotations

from lorascope.diagnosis.causes.config import allocator, overscaled, tied_twice, uneven_scale, unmatched
from lorascope.diagnosis.causes.evidence import Case, Cause, Finding
from lorascope.diagnosis.causes.factors import collapsed, dead, frozen, not_a_number, scale_zero, untrained
from lorascope.diagnosis.causes.training import diverged, leaked, rate_small, unused

__all__ = ["CAUSES", "Case", "Cause", "Finding"]

CAUSES = (
    Cause(("nan",), not_a_number, brings=("diverged", "overscaled", "rate-small", "dead", "collapsed")),
    Cause(("scale-zero",), scale_zero, brings=("unused", "untrained")),
    Cause(("untrained",), untrained),
    Cause(("unused",), unused, "history"),
    Cause(("dead",), dead, brings=("unused", "untrained")),
    Cause(("frozen",), frozen),
    Cause(("unmatched",), unmatched),
    Cause(("overscaled",), overscaled, "weights", ("diverged",)),
    Cause(("uneven-scale",), uneven_scale),
    Cause(("allocator-idle", "budget-missed"), allocator),
    Cause(("rate-small",), rate_small, "weights"),
    Cause(("diverged",), diverged, "history"),
    Cause(("collapsed",), collapsed),
    Cause(("tied-twice",), tied_twice, "base"),
    Cause(("leak",), leaked, "history"),
)
