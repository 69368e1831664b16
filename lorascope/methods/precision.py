"""Precision in which the methods compute."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a method computes with a tensor: its own, or float32 if it is narrower."""
    # Products of small gradients underflow in float16, and bfloat16 has 8 significant bits.
    return torch.promote_types(tensor.dtype, torch.float32)
