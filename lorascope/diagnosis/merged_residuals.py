"""Comparison of a merged weight with the update of PiSSA and OLoRA, whose base PEFT changes while loading.

PEFT computes W_0 - P + s B A, with P from a decomposition of W_0, and rounds after each step. The error of P depends on
the processor, and no entry of it is known, but its norm is bounded: see `peft_residual`.
"""

from __future__ import annotations

import numpy as np

from lorascope.array_types import Float32
from lorascope.diagnosis.inspection import DTYPES
from lorascope.diagnosis.merged_weights import (
    FACTOR_ERROR,
    PRECISION,
    SMALL_DTYPES,
    MergedModule,
    fit_factor,
    largest_spacing,
    summation_error,
)
from lorascope.files.small_floats import round_to_dtype
from lorascope.formats.peft_residual import SubtractedStart
from lorascope.updates.low_rank import LowRank, Residual
from lorascope.updates.weight_update import Update


def compare_residual(
    module: str,
    update: Update,
    start: SubtractedStart,
    W: Float32[np.ndarray, "out in"],
    after: Float32[np.ndarray, "out in"],
    dtype: str,
) -> MergedModule:
    """Compare a weight after the merge with the weight of the base and its update.

    ``update`` is the change from W, and ``dtype`` that of base or merged model with fewer bits.
    """
    change, initial = update.dense().astype(np.float32), start.product().astype(np.float32)
    trained, residual = change + initial, W - initial
    unit = largest_spacing(dtype, W, initial, trained, after)
    allowed = 2 * unit + _summation_errors(update, unit)  # PEFT rounds the residual and the merged weight

    def is_close(weight: Float32[np.ndarray, "out in"], expected: Float32[np.ndarray, "out in"]) -> bool:
        excess = np.maximum(np.abs(weight - expected) - allowed, 0)
        # Both products have an error: the one of PEFT, and the one that is compared with it.
        return bool(np.linalg.norm(excess) <= 2 * start.factors.error)

    factor = fit_factor(after, residual, trained, unit)
    if is_close(after, W + change):
        if is_close(W, W + change):
            return MergedModule(module, "unknown", factor)
        return MergedModule(module, "consistent", factor)
    if is_close(after, W):
        return MergedModule(module, "not merged", 0.0)
    if is_close(after, W + trained):
        return MergedModule(module, "wrong adapter", factor, "added to the base, from which PEFT subtracts the start")
    for smaller in SMALL_DTYPES:
        if PRECISION[smaller] < PRECISION[dtype] and np.array_equal(after, round_to_dtype(after, smaller)):
            return MergedModule(module, "rounded", factor, DTYPES[smaller])
    if is_close(after, residual + np.float32(factor) * trained) and abs(factor - 1) > FACTOR_ERROR:
        return MergedModule(module, "wrong scale", factor)
    return MergedModule(module, "wrong adapter", factor)


def _summation_errors(update: Update, unit: Float32[np.ndarray, "out in"]) -> Float32[np.ndarray, "..."]:
    """Bound the errors of the trained and the initial product in float32, for any order of their sums."""
    if not isinstance(update, Residual) or update.stored is None:
        return summation_error(update, unit)
    B, A, B0, A0 = (update.stored[name] for name in ("B", "A", "B0", "A0"))
    trained, initial = LowRank(B, A, update.scale), LowRank(B0, A0, update.scale)
    return summation_error(trained, unit) + summation_error(initial, unit)
