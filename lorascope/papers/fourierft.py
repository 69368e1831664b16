"""FourierFT: accuracy at its size, number of coefficients, basis, frequencies and start; and its expressiveness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lorascope.evidence.statistics.base import Accuracy, Combined, MeanOverRows, OfRun, Statistic
from lorascope.evidence.store import Evidence

DEFAULT, FEW, MANY = "FourierFT, 1536 coefficients", "FourierFT, 48 coefficients", "FourierFT, 6144 coefficients"
RANDOM, ORTHOGONAL, ZEROS = f"{DEFAULT}, random basis", f"{DEFAULT}, orthogonal basis", f"{DEFAULT}, from zero"
BANDS = tuple(f"{DEFAULT}, band around {center}" for center in (0, 100, 240))
EQUAL, LARGE = "LoRA, rank 2, q and v", "LoRA, rank 8, q and v"
MEDIUM, SMALL = "FourierFT, 192 coefficients", "LoRA, rank 1, q and v"  # only a figure shows these
POINTS, POINTS_RANDOM = "FourierFT", "random basis"
POINTS_SLOW, POINTS_FAST = "LoRA, rank 1, lr 0.01", "LoRA, rank 1, lr 0.1"
COURSE = "course"
"""Kept table ``best_accuracy, epochs``, one row: of a network with one adapter that learns eight classes of points."""


@dataclass(frozen=True)
class BestElsewhere(Statistic):
    """For each seed, the accuracy of the arm with the best mean on the other seeds: (seed,)."""

    choices: Sequence[str]

    def arms(self) -> set[str]:
        return set(self.choices)

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {("margin", arm): () for arm in self.choices}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        reached = np.stack([MeanOverRows(Accuracy(arm))(evidence, seeds) for arm in self.choices])
        others = reached.sum(axis=1, keepdims=True) - reached
        return np.take_along_axis(reached, others.argmax(axis=0)[None], axis=0)[0]


def best_accuracy(table: pd.DataFrame) -> float:
    """Return the best training accuracy of a course."""
    return float(table["best_accuracy"].item())


def log_epochs(table: pd.DataFrame) -> float:
    """Return log10 of the epochs until all points were classified correctly, or of all epochs."""
    return float(np.log10(table["epochs"].item()))


CLAIMS = {
    "fourierft.parity": (Accuracy(DEFAULT), Accuracy(LARGE)),
    "fourierft.equal": (Accuracy(DEFAULT), Accuracy(EQUAL)),
    "fourierft.more": (Accuracy(DEFAULT), Accuracy(FEW)),
    "fourierft.enough": (Accuracy(MANY), Accuracy(DEFAULT)),
    "fourierft.random": (Accuracy(DEFAULT), Accuracy(RANDOM)),
    "fourierft.orthogonal": (Accuracy(DEFAULT), Accuracy(ORTHOGONAL)),
    "fourierft.band": (BestElsewhere(BANDS), MeanOverRows(Accuracy(DEFAULT))),
    "fourierft.start": (Accuracy(DEFAULT), Accuracy(ZEROS)),
    "expressiveness.more": (
        OfRun(best_accuracy, COURSE, POINTS),
        Combined(np.maximum, (OfRun(best_accuracy, COURSE, POINTS_SLOW), OfRun(best_accuracy, COURSE, POINTS_FAST))),
    ),
    "expressiveness.frequencies": (-OfRun(log_epochs, COURSE, POINTS), -OfRun(log_epochs, COURSE, POINTS_RANDOM)),
}
