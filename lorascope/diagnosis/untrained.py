"""Norms of the updates that adapters have before training, as far as they follow from an adapter's files.

Most kinds start at zero. FourierFT, C3A and WaveFT (with ``init_weights: false``) may start from independent random
coefficients; |dW| is a weighted norm of them. Its root mean square before training is sqrt(n) sigma |dW| / |c|, with
n coefficients c and the standard deviation sigma at the start. This is exact if all coefficients have the same weight,
as in C3A; entries of FourierFT that are their own mirror image weigh more.

VB-LoRA and Uni-LoRA start from random vectors that modules share, and PiSSA, OLoRA and similar initializations of LoRA
from factors of the base weights. The updates of these starts are not in the files.

Source: PEFT 0.21.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorascope.analysis.initial_update import at_start
from lorascope.formats.peft_config import RESIDUAL_INITS
from lorascope.formats.peft_merge import MERGED
from lorascope.formats.stored_update import StoredUpdate
from lorascope.runs.adapter import Adapter
from lorascope.runs.result import Result
from lorascope.updates.linalg import as_float64

_RANDOM = {"VB-LoRA", "Uni-LoRA", "KaSA", *MERGED}
"""Kinds whose start is random or depends on the base."""


def untrained_norms(run: Result, norms: Mapping[str, float]) -> dict[str, float]:
    """Return the root mean square of |dW| of every module before training; NaN if it is not known.

    Parameters
    ----------
    run : Result
        Adapter, or a run, whose initial update is saved unless it is zero.
    norms : mapping module -> float
        |dW| after training.
    """
    if not isinstance(run, Adapter):
        first, start = at_start(run.updates), 0.0 if run.fact("starts_at_zero", True) else np.nan
        return {module: first[module].norm() if module in first else start for module in norms}
    kind, config = run.files.kind, run.files.config
    return {module: _untrained_norm(kind, config, run.files.parts[module], norm) for module, norm in norms.items()}


def _untrained_norm(kind: str, config: Mapping[str, Any], part: StoredUpdate, norm: float) -> float:
    sigma = _deviation(kind, config, part)
    if sigma == 0 or np.isnan(sigma):
        return sigma
    coefficients = as_float64(next(iter(part._tensors())).read())
    size = float(np.linalg.norm(coefficients))
    return math.sqrt(coefficients.size) * sigma * norm / size if size else np.nan


def _deviation(kind: str, config: Mapping[str, Any], part: StoredUpdate) -> float:
    """Return the standard deviation of the coefficients at the start, 0 if the update is zero, NaN if unknown."""
    given = config.get("init_weights")
    outer, inner = part.shape
    if kind == "FourierFT":
        return 0.0 if given else 1.0
    if kind == "WaveFT":
        return 0.01 if given is False else 0.0
    if kind == "C3A":
        known = {"gaussian": 1.0, "kaiming_uniform": math.sqrt(1 / (3 * inner))}
        known |= {"xavier_uniform": math.sqrt(2 / (outer + inner)), "True": 0.0}
        return known.get(str(given or "xavier_uniform"), np.nan)
    start = str(config.get("init_lora_weights", True)).lower()
    return np.nan if kind in _RANDOM or start.startswith(("false", *RESIDUAL_INITS)) else 0.0
