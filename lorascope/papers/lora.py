"""LoRA: accuracy, the first direction of A, rank, few examples, and the directions of the base weight."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from lorascope.evidence.statistics.base import Accuracy, OfPairs, OfRun

FULL, LOW, HIGH = "full fine-tuning", "LoRA, rank 8", "LoRA, rank 64"
FEW_FULL, FEW_LOW = f"{FULL}, 100 examples", f"{LOW}, 100 examples"
WORDS = "TF-IDF, logistic regression"
# Only figures show these.
LOWER = {1: "LoRA, rank 1", 2: "LoRA, rank 2"}
MORE_FULL, MORE_LOW = f"{FULL}, 1,000 examples", f"{LOW}, 1,000 examples"
DIRECTIONS = "directions"
"""Kept table ``module, when, index, value``: first right singular vector of A, ``when`` is "start" or "end"."""
AMPLIFICATION = "amplification"
"""Kept table ``module, update, random``: norm of W between eight directions of the update, and between random ones."""


def direction_phi(low: pd.DataFrame, high: pd.DataFrame, when: str) -> float:
    """Compute phi(1, 1) between the A's of two runs: squared cosine of their first directions, mean over modules."""
    both = low[low["when"] == when].merge(high[high["when"] == when], on=["module", "index"], suffixes=("_1", "_2"))
    one, two = both["value_1"].astype("float64"), both["value_2"].astype("float64")
    sums = pd.DataFrame({"module": both["module"], "inner": one * two, "one": one**2, "two": two**2})
    found = sums.groupby("module")[["inner", "one", "two"]].sum()
    return float((found["inner"] ** 2 / (found["one"] * found["two"])).mean())


def log_norm(table: pd.DataFrame, directions: str) -> float:
    """Compute log10 of the norm of W between some directions, mean over modules."""
    return float(np.log10(table[directions].astype("float64")).mean())


CLAIMS = {
    "lora.parity": (Accuracy(LOW), Accuracy(FULL)),
    "lora.words": (Accuracy(LOW), Accuracy(WORDS)),
    "lora.direction": (
        OfPairs(partial(direction_phi, when="end"), DIRECTIONS, LOW, HIGH),
        OfPairs(partial(direction_phi, when="start"), DIRECTIONS, LOW, HIGH),
    ),
    "lora.rank": (Accuracy(HIGH), Accuracy(LOW)),
    "lora.lowdata": (Accuracy(FEW_LOW), Accuracy(FEW_FULL)),
    "lora.amplify": (
        OfRun(partial(log_norm, directions="update"), AMPLIFICATION, LOW),
        OfRun(partial(log_norm, directions="random"), AMPLIFICATION, LOW),
    ),
}
