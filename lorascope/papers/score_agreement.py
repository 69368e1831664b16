"""Importance scores: correlation with the loss increase when a component is removed."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from lorascope.analysis.score_agreement import spearman
from lorascope.evidence.statistics.base import Constant, OfRun
from lorascope.evidence.statistics.lora import LOW

SCORES = "scores"
"""Kept table ``module, component, score, value``: scores and loss increases of the components of a run."""
HALVES = ("loss increase", "loss increase, other half")
ADALORA, AUTOLORA, ALORA, SIZE = "AdaLoRA importance", "AutoLoRA alpha", "ALoRA importance", "singular value"


def correlation(table: pd.DataFrame, score: str) -> float:
    """Compute Spearman's correlation of a score and the loss increase on both halves together, over components."""
    wide = table[table["component"] >= 0].pivot(index=["module", "component"], columns="score", values="value")
    truth = wide[list(HALVES)].mean(axis=1)
    return float(spearman(np.column_stack([wide[score], truth]))[0, 1])


def with_truth(score: str) -> OfRun:
    """Return the correlation of a score with the loss increase."""
    return OfRun(partial(correlation, score=score), SCORES, LOW)


CLAIMS = {
    "agreement.adalora": (with_truth(ADALORA), Constant(0.0)),
    "agreement.autolora": (with_truth(AUTOLORA), Constant(0.0)),
    "agreement.size.adalora": (with_truth(ADALORA), with_truth(SIZE)),
    "agreement.size.autolora": (with_truth(AUTOLORA), with_truth(SIZE)),
    "agreement.size.alora": (with_truth(ALORA), with_truth(SIZE)),
}
