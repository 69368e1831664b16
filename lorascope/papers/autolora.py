"""AutoLoRA: spread of the learned ranks, agreement of seeds and tasks, and accuracy with these ranks."""

from __future__ import annotations

import pandas as pd

from lorascope.evidence.statistics.base import Accuracy, OfRun, Simulated, average
from lorascope.evidence.statistics.ranks import RANKS, agreement

ADAPTED, DOMAINS = "AutoLoRA", "AutoLoRA, search only, domains"
UNIFORM, RANDOM = "LoRA, rank 4, q and v", "LoRA, ranks from random logits, q and v"


def spread(table: pd.DataFrame) -> float:
    """Compute the standard deviation of the final ranks over modules."""
    return float(table["value"].std(ddof=1))


CLAIMS = {
    # Deviation over 12 modules that keep the components with at least the mean of 8 logits, which are small and normal.
    "autolora.spread": (OfRun(spread, RANKS, ADAPTED), Simulated(0.8316, draws=1_000_000, error=0.0002)),
    "autolora.tasks": (average([agreement(ADAPTED), agreement(DOMAINS)]), agreement(ADAPTED, DOMAINS)),
    "autolora.better": (Accuracy(ADAPTED), Accuracy(UNIFORM)),
    "autolora.over_random": (Accuracy(ADAPTED), Accuracy(RANDOM)),
}
