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
FAVORABLE, OTHER, POSITIVE = "truth that favors the method", "other truth", "positive control"
BOUND = "bound: gain or cost that matters"
SMALL = "An interval smaller than its dot is inside it."
"""Sentence of captions on intervals."""
GAP = "Gap closed: 0 is the base model, 100 its teacher."
"""Sentence of captions on the ends of the scale."""
SIDES = (FAVORABLE, OTHER, POSITIVE)
"""Effects of a pair, in the order of their colors."""
SIGNS = {"gain": 1.0, "cost": -1.0}
"""Side of zero on which the bound of a claim is, by the kind of its rule."""
_SHORT = {
    "AdaLoRA, rank 4 to 2": "AdaLoRA",
    "AutoLoRA, from rank 4": "AutoLoRA",
    "LISA, 2 of 8 blocks": "LISA",
    "FourierFT, 192 coefficients from zero": "FourierFT",
    "FourierFT, 192 coefficients, random basis": "random basis",
    "HydraLoRA, 4 experts of rank 4": "HydraLoRA",
    "HydraLoRA, separate A's of rank 3": "separate A's",
    "HydraLoRA, separate A's of rank 6": "separate, rank 6",
    "LISA on the two blocks": "LISA, right blocks",
    "LoRA, rank 2, attention": "LoRA, rank 2",
    "LoRA, rank 8, attention": "LoRA, rank 8",
    "LoRA, rank 4, one task only": "one task only",
    "NeFT, random neurons": "random neurons",
    "one update for all tasks": "one update for all",
    "second moments without structure": "no structure",
    "9% of neurons change": "9% of neurons",
    "all neurons change": "all neurons",
    "its entries": "FourierFT's entries",
}
"""Short names of methods whose labels differ in a detail that the page of the paper explains, and of truths."""


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


def short_method(method: str) -> str:
    """Return the name of an arm's method, without the details that its page explains."""
    return _SHORT.get(method, method)


def compared_methods(claim: StudyClaim) -> str:
    """Return the method of a pair and its control, without their ranks."""
    names = []
    for arm in claim.for_arms:
        method, _ = split_label(arm)
        names.append(_SHORT.get(method, method.partition(", ")[0]))
    return " vs ".join(names)


def truths(claim: StudyClaim) -> dict[str, str]:
    """Return the names of the truths of a pair by ``FAVORABLE`` and ``OTHER``."""
    names = {}
    for side, arms in ((FAVORABLE, claim.for_arms), (OTHER, claim.against_arms)):
        for arm in arms[:1]:
            truth = split_label(arm)[1]
            names[side] = _SHORT.get(truth, truth.removeprefix("second "))
    return names


def arrange(charts: Sequence[Chart], title: str) -> Panels:
    """Arrange charts of equal size in rows of at most three, below a title."""
    starts = range(0, len(charts), _ROW)
    return Panels(
        tuple(tuple(charts[start : start + _ROW]) for start in starts), columns=min(len(charts), _ROW), title=title
    )


def write_word(x: Any, y: Any, word: str = "not run") -> Text:
    """Return the mark of a gray word that replaces dots or lines."""
    return Text("x", "y", "word", muted=True, data=pd.DataFrame({"x": [x], "y": [y], "word": [word]}))
