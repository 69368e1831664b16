"""Adapprox: test loss against other optimizers, and the tail of Adam's second moments."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.evidence.statistics.base import Constant, LogLikelihood, OfRun

OURS, ADAMW, ADAFACTOR, CAME = "Adapprox", "AdamW", "Adafactor", "CAME"
PRE_OURS, PRE_ADAMW, PRE_ADAFACTOR, PRE_CAME = (f"{name}, pre-training" for name in (OURS, ADAMW, ADAFACTOR, CAME))
TAILS = "tails"
"""Kept table ``module, beyond, dealt``: energy beyond eight singular values, of a second moment and shuffled."""


def log_tail_ratio(table: pd.DataFrame) -> float:
    """Compute log10 of the energy beyond eight in the shuffled matrix over that in the real one, mean over matrices."""
    return float(np.log10(table["dealt"] / table["beyond"]).mean())


CLAIMS = {
    "adapprox.pretraining": (LogLikelihood(PRE_OURS), LogLikelihood(PRE_ADAMW)),
    "adapprox.pre_adafactor": (LogLikelihood(PRE_OURS), LogLikelihood(PRE_ADAFACTOR)),
    "adapprox.pre_came": (LogLikelihood(PRE_OURS), LogLikelihood(PRE_CAME)),
    "adapprox.tail": (OfRun(log_tail_ratio, TAILS, ADAMW), Constant(0.0)),
    "adapprox.parity": (LogLikelihood(OURS), LogLikelihood(ADAMW)),
    "adapprox.over_adafactor": (LogLikelihood(OURS), LogLikelihood(ADAFACTOR)),
    "adapprox.over_came": (LogLikelihood(OURS), LogLikelihood(CAME)),
}
