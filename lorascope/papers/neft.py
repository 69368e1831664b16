"""NeFT: accuracy, the choice of neurons, its agreement between seeds and tasks, and the use of neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lorascope.evidence.statistics.base import Accuracy, OfPairs, Statistic, average
from lorascope.evidence.statistics.lora import FULL, LOW
from lorascope.evidence.store import Evidence

CHANGED, RANDOM, PROBED = "NeFT, 9%", "NeFT, 9%, random", "NeFT, 9%, linear probes"
FEW, REVERSED = "NeFT, 3%", "NeFT, 3% and 6% reversed"
MOVIES, TWEETS = "NeFT, choice only, movies", "NeFT, choice only, tweets"
SELECTED = "selected"
"""Kept table ``module, size, pool, neuron``: selected neurons, number of neurons of the module and of all modules."""
UTILIZATION = "utilization"
"""Kept table ``role, rank``: rank of every neuron by utilization within its role, in a fixed order."""


def overlap(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute the overlap of two selections, as a fraction of the smaller one."""
    return len(first.merge(second, on=["module", "neuron"])) / min(len(first), len(second))


def pooled_chance(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute the expected overlap of random selections from all modules together."""
    return max(len(first), len(second)) / float(first["pool"].iloc[0])


def module_chance(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute the expected overlap of random selections with as many neurons in every module."""
    one, two = (table["module"].astype("str").value_counts() for table in (first, second))
    sizes = pd.concat([first, second]).astype({"module": "str"}).groupby("module")["size"].first()
    return float((one * two / sizes).sum() / min(len(first), len(second)))


@dataclass(frozen=True)
class ShiftFrom(Statistic):
    """Mean absolute shift of the utilization ranks of an arm from those of another with the same seed: (seed,).

    Shifts are fractions of the number of ranks in the neuron's role.
    """

    reference: str
    arm: str

    def arms(self) -> set[str]:
        return {self.reference, self.arm}

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {(UTILIZATION, arm): () for arm in (self.reference, self.arm)}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        found = []
        for seed in seeds:
            before, after = (evidence.table(UTILIZATION, arm, seed) for arm in (self.reference, self.arm))
            sizes = after.groupby("role")["rank"].transform("size")
            moved = (after["rank"].astype("float64") - before["rank"].astype("float64")).abs()
            found.append(float((moved / sizes).mean()))
        return np.array(found)


CLAIMS = {
    "neft.over_full": (Accuracy(CHANGED), Accuracy(FULL)),
    "neft.over_lora": (Accuracy(CHANGED), Accuracy(LOW)),
    "neft.choice": (Accuracy(CHANGED), Accuracy(RANDOM)),
    "neft.reversed": (Accuracy(CHANGED), Accuracy(REVERSED)),
    "neft.probed": (Accuracy(PROBED), Accuracy(RANDOM)),
    "neft.stable": (
        OfPairs(overlap, SELECTED, CHANGED, CHANGED),
        OfPairs(pooled_chance, SELECTED, CHANGED, CHANGED),
    ),
    "neft.layers": (
        OfPairs(overlap, SELECTED, CHANGED, CHANGED),
        OfPairs(module_chance, SELECTED, CHANGED, CHANGED),
    ),
    "neft.task": (
        average(OfPairs(overlap, SELECTED, arm, arm) for arm in (MOVIES, TWEETS)),
        OfPairs(overlap, SELECTED, MOVIES, TWEETS),
    ),
    "neft.use": (ShiftFrom(FEW, REVERSED), ShiftFrom(FEW, CHANGED)),
}
