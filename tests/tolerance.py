"""Tolerances of floating-point comparisons, derived from the type, the size and the number of operations.

Two programs that compute the same value round it differently. The order and blocking of sums, fused multiply-add,
vector widths and the library's exp and tanh depend on the processor. So a tolerance is never the difference measured on
one machine. Tests compare two computations in one type, or one computation with its value in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

SURE = 6.0  # standard deviations, see ``rounding``
TINY = 64  # longest sum in a model of ``tiny``: its vocabulary
TEXT = 5.0  # ``amplification`` of the text models of ``tiny`` with small updates is below


def rounding(dtype: torch.dtype = torch.float32, terms: int = 1, depth: int = 1, growth: float = 1.0) -> float:
    """Return the largest relative difference of two computations of the same value on any processor.

    A sum of n products in any order is off by at most n u of the sum of their absolute values, u = eps / 2 (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1), and by more than c sqrt(n) u with a
    probability of 2 exp(-c^2 / 2) (Higham and Mary 2019, theorem 2.4): 3e-8 for c = 6. Two computations differ by twice
    that.

    Parameters
    ----------
    dtype : torch.dtype
        Type of the arithmetic.
    terms : int
        n: number of terms of the longest sum.
    depth : int
        Number of successive operations of this kind; their errors accumulate like those of a longer sum.
    growth : float
        Factor by which later operations amplify a relative error: a condition number or ``amplification``.
    """
    roundings = terms * depth
    return torch.finfo(dtype).eps * min(roundings, SURE * math.sqrt(roundings)) * growth


def near(expected: Any, scale: float | None = None, **model: Any) -> Any:
    """Return pytest.approx with the absolute tolerance ``scale * rounding(**model)``.

    An entry that is small by cancellation has the error of its terms, so the default scale is the largest entry.
    """
    values = expected.detach().double().numpy() if isinstance(expected, Tensor) else expected
    if scale is None:
        scale = float(np.abs(list(values.values()) if isinstance(values, dict) else np.asarray(values)).max())
    return pytest.approx(values, rel=0, abs=scale * rounding(**model))


def amplification(model: nn.Module, compute: Callable[[nn.Module], Tensor], draws: int = 4) -> float:
    """Return the relative change of a result per relative change of all weights, at least 1; measured in float64.

    A product in floating point is the exact product of weights that are off by its rounding (backward error), so this
    times ``rounding`` of one sum is the error of the whole model. It is the largest of a few random changes.

    Parameters
    ----------
    model : Module
    compute : callable (Module) -> Tensor
        Function of a copy of the model in float64.
    draws : int
        Number of random changes.
    """
    size, generator = 1e-5, torch.Generator().manual_seed(0)  # above the float32 inside some models' norms
    wide = copy.deepcopy(model).double()
    result, found = compute(wide).detach(), [1.0]
    for _ in range(draws):
        other = copy.deepcopy(wide)
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                if tensor.is_floating_point():
                    tensor.mul_(1 + size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
        found.append(float((compute(other).detach() - result).norm() / result.norm() / size))
    return max(found)


def forward(
    model: nn.Module, given: Mapping[str, Tensor], terms: int = TINY, dtype: torch.dtype = torch.float32
) -> float:
    """Return the largest relative difference, in norm, of a model's logits computed in two ways."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    return rounding(dtype, terms, growth=amplification(model, lambda model: model(**wide).logits))
