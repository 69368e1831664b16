"""Arms by method and truth, the word where nothing was run, and rows of panels, for figures of the second edition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Text
from lorascope.papers.judging.registered_study import StudyClaim

_ROW = 3  # panels
FAVORABLE, OTHER = "truth that favors the method", "other truth"


class ClaimArm(NamedTuple):
    """Arm of a claim: its label, the method and the truth that the label names, and which of the two truths it is."""

    arm: str
    method: str
    truth: str
    side: str


def claim_arms(claim: StudyClaim) -> list[ClaimArm]:
    """Return the arms of a claim, each once: those of the effect, of the other truth, and of the positive control."""
    arms = {}
    sides = {split_label(claim.for_arms[0])[1]: FAVORABLE}
    for label in (*claim.for_arms, *claim.against_arms, *claim.control_arms):
        method, truth = split_label(label)
        arms[label] = ClaimArm(label, method, truth, sides.get(truth, OTHER))
    return list(arms.values())


def split_label(label: str) -> tuple[str, str]:
    """Return the method and the truth of an arm; methods that learn one task each are one method."""
    method, _, truth = label.rpartition(", ")
    return re.sub(r"task \d+ only", "one task only", method), truth


def arrange(charts: Sequence[Chart]) -> Panels:
    """Arrange charts of equal size in rows of at most three."""
    starts = range(0, len(charts), _ROW)
    return Panels(tuple(tuple(charts[start : start + _ROW]) for start in starts), columns=min(len(charts), _ROW))


def write_word(x: Any, y: Any, word: str = "not run") -> Text:
    """Return the mark of a gray word that replaces dots or lines."""
    return Text("x", "y", "word", muted=True, data=pd.DataFrame({"x": [x], "y": [y], "word": [word]}))
