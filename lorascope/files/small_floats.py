"""Floating-point types of safetensors that numpy does not have: bfloat16 and float8.

Their bits are integers in numpy, and all their values are values of float32. F8_E4M3 has 4 bits of exponent and 3 of
mantissa, no infinity and one NaN of each sign (``torch.float8_e4m3fn``). F8_E5M2 is the upper byte of float16.

Source: Micikevicius et al. (arXiv 2209.05433), table 1.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from lorascope.array_types import Float32

FLOAT8 = ("F8_E4M3", "F8_E5M2")
ENCODED = ("BF16", *FLOAT8)
"""Types whose values are stored as integers with the same bits."""


class _Float8(NamedTuple):
    """Limits of a type: bits after the leading one, smallest exponent, largest value, and that of larger numbers."""

    mantissa: int
    least_exponent: int
    largest: float
    overflow: float


_LIMITS = {"F8_E4M3": _Float8(3, -6, 448, 448), "F8_E5M2": _Float8(2, -14, 57344, np.inf)}


def decode(bits: np.ndarray, dtype: str) -> Float32[np.ndarray, "..."]:
    """Convert the bits of a type in ``ENCODED`` to float32."""
    if dtype == "BF16":  # the upper half of float32
        wide = bits.astype("<u4")
        wide <<= 16
        return wide.view("<f4")
    return np.asarray(_float8_values(dtype)[bits])  # one index without dimensions selects a scalar


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the bits of values that a type in ``ENCODED`` represents exactly; other values are cut off."""
    values = np.asarray(values, np.float32)
    if dtype == "BF16":
        return (np.ascontiguousarray(values).view("<u4") >> 16).astype("<u2").reshape(values.shape)
    positive = _float8_values(dtype)[:128]
    count = int(np.isfinite(positive).sum())  # infinity and NaN follow
    codes = np.searchsorted(positive[:count], np.abs(values), side="right") - 1
    codes = np.where(np.isinf(values), count, codes)
    codes = np.where(np.isnan(values), 127, codes)
    return (codes + 128 * np.signbit(values)).astype(np.uint8)


def round_to_dtype(values: Float32[np.ndarray, "..."], dtype: str) -> Float32[np.ndarray, "..."]:
    """Round float32 to the nearest values of a dtype of safetensors, of two the even one.

    Values above the largest one become infinite, and the largest one in F8_E4M3, as in torch 2.13.
    """
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        return round_to_bfloat16(values)
    if dtype not in FLOAT8:
        return values
    unit, limits = float8_spacing(values, dtype), _LIMITS[dtype]
    rounded = np.rint(values / unit) * unit
    overflow = np.copysign(np.float32(limits.overflow), values)
    return np.where(np.abs(rounded) > limits.largest, overflow, rounded)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 as for safetensors files: nearest, of two the even one; infinities and NaN stay."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, rounded.view(np.float32))


def float8_spacing(values: Float32[np.ndarray, "..."], dtype: str) -> Float32[np.ndarray, "..."]:
    """Return the unit in the last place of each value in a float8."""
    limits = _LIMITS[dtype]
    exponents = np.frexp(values)[1] - 1  # the fraction of frexp is below 1
    exponents = np.where(values == 0, limits.least_exponent, np.maximum(exponents, limits.least_exponent))
    return np.ldexp(np.float32(1), exponents - limits.mantissa)


@cache
def _float8_values(dtype: str) -> Float32[np.ndarray, "256"]:
    """Return the values of all 256 codes."""
    codes = np.arange(256)
    if dtype == "F8_E5M2":
        return (codes << 8).astype("<u2").view("<f2").astype(np.float32)
    exponents, fractions = (codes >> 3) & 15, codes & 7
    # Without an exponent, the leading one is missing.
    magnitudes = np.where(exponents > 0, np.ldexp(8.0 + fractions, exponents - 10), np.ldexp(fractions, -9))
    magnitudes[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, magnitudes, -magnitudes).astype(np.float32)
