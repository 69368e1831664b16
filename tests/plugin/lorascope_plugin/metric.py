"""A metric that is the fraction of rows whose second label is recognized."""

from __future__ import annotations

import numpy as np

from lorascope.inputs.metrics import Metric, add


def recall(predicted: np.ndarray, answers: np.ndarray) -> float:
    """Compute the recall of the second label."""
    return float((predicted[answers == 1] == 1).mean())


add(Metric("recall", "two classes", True, recall))
