"""Comparison of one merged weight with base and update, and the arithmetic of a merge in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lorascope.array_types import Float32
from lorascope.diagnosis.inspection import DTYPES
from lorascope.files.small_floats import FLOAT8, float8_spacing, round_to_dtype
from lorascope.updates.weight_update import Update

Verdict = Literal[
    *("merged", "consistent", "unknown", "not compared", "changed base"),
    *("not merged", "wrong scale", "rounded", "experts swapped", "another module's", "wrong adapter", "misfit"),
]
PRECISION = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
"""Bits after the leading one."""
SMALL_DTYPES = ("F16", "BF16", "F8_E4M3", "F8_E5M2")
_COMMON_FACTORS = (0.0, 2.0, -1.0, 0.5, 1 / 3)  # not merged, merged twice, subtracted; alpha = r, and three for one
FACTOR_ERROR = 0.02  # relative error of a fitted scale, below that of the closest mistake, rank 17 instead of 16
_FITTING = 0.999  # of the entries must fit a mistake: a sum in another order rounds few entries another way
_CLOSER = 0.5  # a mistake must explain at least half of the entries that a merge does not
_FEWEST_FITTED = 100  # entries that are larger than their rounding, from which a scale can be fitted


@dataclass(frozen=True)
class MergedModule:
    """Comparison of one merged weight with base and update.

    Parameters
    ----------
    module : str
        Name of the module.
    verdict : str
        ``"merged"`` is proved bit by bit, ``"consistent"`` within the rounding, ``"unknown"`` if the
        update is smaller than the rounding, ``"not compared"`` if the base has no such weight, ``"changed base"`` if
        PEFT changes the base weight while loading in a way that cannot be repeated, ``"misfit"`` if one of the models
        is another one. The other verdicts are faults of the merge.
    factor : float
        Multiple of the update that the weight contains, by least squares; NaN if it was not compared.
    note : str
        Dtype that it was rounded to, module whose update it contains, or shapes that do not fit.
    """

    module: str
    verdict: Verdict
    factor: float
    note: str = ""

    @property
    def label(self) -> str:
        """Name, with the note if there is one."""
        if not self.note:
            return self.module
        return f"{self.module} ({self.note})"


def compare_weight(
    module: str,
    update: Update,
    W: Float32[np.ndarray, "out in"],
    after: Float32[np.ndarray, "out in"],
    dtype: str,
    merged_dtype: str,
) -> MergedModule:
    """Compare a weight after the merge with the weight of the base and its update."""
    d = float32_update(update)
    coarse = coarser(dtype, merged_dtype)
    rounded = {target: round_to_dtype(W + d, target) for target in {coarse, merged_dtype}}
    rounded_once = rounded[coarse]
    merges = [*rounded.values(), round_to_dtype(W + round_to_dtype(d, coarse), coarse)]
    unequal_to_merge = min(float((after != merge).mean()) for merge in merges)
    is_visible = not all(np.array_equal(merge, W) for merge in merges)
    unit = largest_spacing(coarse, W, d, rounded_once)
    factor = fit_factor(after, W, d, unit)

    # A weight that fits a merge bit by bit is merged, even if it also fits a mistake.
    if update.low_rank is not None and unequal_to_merge == 0:
        return MergedModule(module, "merged" if is_visible or not d.any() else "unknown", factor)
    if not is_visible and misfit(after, W, unit) == 0:
        return MergedModule(module, "unknown", factor)

    root = np.sqrt(max(update.rank, 1))  # rsLoRA's scale is alpha / sqrt(r) instead of alpha / r
    factors = [*_COMMON_FACTORS, factor, 1 / root, root]
    mistakes = {multiple: round_to_dtype(W + np.float32(multiple) * d, coarse) for multiple in factors}
    twice = round_to_dtype(rounded_once + d, coarse)  # a second merge adds to the rounded first one
    if (after != twice).sum() < (after != mistakes[2.0]).sum():
        mistakes[2.0] = twice
    unequal = {multiple: float((after != mistake).mean()) for multiple, mistake in mistakes.items()}
    closest = min(unequal, key=unequal.__getitem__)
    fits_mistake = misfit(after, mistakes[closest], unit) <= 1 - _FITTING and abs(closest - 1) > FACTOR_ERROR
    if fits_mistake and unequal[closest] < _CLOSER * unequal_to_merge:
        return MergedModule(module, "wrong scale" if closest else "not merged", closest)

    allowed = unit + summation_error(update, unit)
    if any(misfit(after, merge, allowed) == 0 for merge in merges):
        return MergedModule(module, "consistent", factor)
    # All entries are values of a dtype that is smaller than those of both models.
    for smaller in SMALL_DTYPES:
        fits = PRECISION[smaller] < PRECISION[coarse] and np.array_equal(after, round_to_dtype(after, smaller))
        if fits and misfit(after, round_to_dtype(W + d, smaller), _spacing(rounded_once, smaller)) == 0:
            return MergedModule(module, "rounded", factor, DTYPES[smaller])

    # The fitted scale is not one of the mistakes: its error counts, in proportion to the update.
    scaled = round_to_dtype(W + np.float32(factor) * d, coarse)
    if factor and misfit(after, scaled, unit + FACTOR_ERROR * abs(factor) * np.abs(d)) <= 1 - _FITTING:
        return MergedModule(module, "wrong scale", factor)
    return MergedModule(module, "wrong adapter", factor)


def summation_error(update: Update, unit: Float32[np.ndarray, "out in"]) -> Float32[np.ndarray, "..."]:
    """Bound the error of an update in float32, for any order of its sums.

    A product of rank r has r terms per entry. Other updates take operations between entries of a row, such as its norm.
    """
    if (product := update.low_rank) is None:
        return 2 * unit.max(axis=1, keepdims=True)
    B, A = np.asarray(product.B, np.float32), np.asarray(product.A, np.float32)
    # Each of the operations on an entry rounds by at most 2**-24 of its value.
    return np.float32(product.rank * abs(product.scale) * 2.0**-24) * (np.abs(B) @ np.abs(A))


def misfit(
    after: Float32[np.ndarray, "out in"],
    expected: Float32[np.ndarray, "out in"],
    allowed: Float32[np.ndarray, "out in"],
) -> float:
    """Return the fraction of entries that differ from the expected ones by more than is allowed."""
    return float((~(np.abs(after - expected) <= allowed)).mean())


def fit_factor(
    after: Float32[np.ndarray, "out in"],
    W: Float32[np.ndarray, "out in"],
    d: Float32[np.ndarray, "out in"],
    unit: Float32[np.ndarray, "out in"],
) -> float:
    """Return the multiple of the update in a change, by least squares over entries larger than their rounding."""
    delta, wide = after.astype(np.float64) - W, d.astype(np.float64)
    large = np.abs(d) > unit
    if large.sum() >= _FEWEST_FITTED:
        delta, wide = delta[large], wide[large]
    energy = float(np.vdot(wide, wide))
    if energy == 0:  # a zero update is in the change zero times
        return 0.0
    return float(np.vdot(delta, wide)) / energy


def float32_update(update: Update) -> Float32[np.ndarray, "out in"]:
    """Return the update as PEFT computes it on a CPU: factors and scale in float32."""
    if (product := update.low_rank) is not None:
        B, A = np.asarray(product.B, np.float32), np.asarray(product.A, np.float32)
        return (B @ A) * np.float32(product.scale)
    return update.dense().astype(np.float32)


def coarser(left: str, right: str) -> str:
    return min(left, right, key=PRECISION.__getitem__)


def _spacing(values: Float32[np.ndarray, "..."], dtype: str) -> Float32[np.ndarray, "..."]:
    """Return the unit in the last place of each value."""
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.abs(np.spacing(values.astype(np.float16))).astype(np.float32)
    if dtype in FLOAT8:
        return float8_spacing(values, dtype)
    unit = np.abs(np.spacing(values))
    if dtype == "BF16":
        return unit * np.float32(2.0 ** (PRECISION["F32"] - PRECISION["BF16"]))
    return unit


def largest_spacing(dtype: str, *arrays: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Return the unit in the last place of the largest of several values, by entry."""
    return np.maximum.reduce([_spacing(values, dtype) for values in arrays])
