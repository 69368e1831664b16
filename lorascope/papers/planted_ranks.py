"""Planted ranks: whether allocators find the ranks that a teacher needs, and learn it better with them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.analysis.score_agreement import spearman
from lorascope.evidence.statistics.base import Constant, LogLikelihood, MeanOverRows, OfRun

ALLOCATORS = {"adalora": "AdaLoRA, planted", "autolora": "AutoLoRA, planted", "alora": "ALoRA, planted"}
UNIFORM = "LoRA, uniform ranks"
RECOVERY = "recovery"
"""Kept table ``module, planted, found``: rank of the teacher's update, and rank that the student ends with."""
UNIFORM_DISTANCE = 1.5
"""Mean distance of rank 2 from the planted ranks 0, 1, 3 and 4, each in a quarter of the modules."""


def correlation(table: pd.DataFrame) -> float:
    """Compute Spearman's correlation of found and planted ranks; 0 if all found ranks are equal."""
    rho = float(spearman(table[["planted", "found"]].to_numpy(np.float64))[0, 1])
    return 0.0 if np.isnan(rho) else rho


def distance(table: pd.DataFrame) -> float:
    """Compute the mean of ``|found - planted|`` over modules."""
    return float((table["found"] - table["planted"]).abs().mean())


def log_likelihood(arm: str) -> MeanOverRows:
    """Return minus the test loss."""
    return MeanOverRows(LogLikelihood(arm))


ADALORA, AUTOLORA, ALORA = ALLOCATORS.values()

CLAIMS = {
    "planted.adalora_correlation": (OfRun(correlation, RECOVERY, ADALORA), Constant(0.0)),
    "planted.adalora_distance": (-OfRun(distance, RECOVERY, ADALORA), -Constant(UNIFORM_DISTANCE)),
    "planted.adalora_loss": (log_likelihood(ADALORA), log_likelihood(UNIFORM)),
    "planted.autolora_correlation": (OfRun(correlation, RECOVERY, AUTOLORA), Constant(0.0)),
    "planted.autolora_distance": (-OfRun(distance, RECOVERY, AUTOLORA), -Constant(UNIFORM_DISTANCE)),
    "planted.autolora_loss": (log_likelihood(AUTOLORA), log_likelihood(UNIFORM)),
    "planted.alora_correlation": (OfRun(correlation, RECOVERY, ALORA), Constant(0.0)),
    "planted.alora_distance": (-OfRun(distance, RECOVERY, ALORA), -Constant(UNIFORM_DISTANCE)),
    "planted.alora_loss": (log_likelihood(ALORA), log_likelihood(UNIFORM)),
}
