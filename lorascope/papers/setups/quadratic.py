"""Quadratic whose gradients have second moments of a known structure, on which optimizers are compared.

    f(W) = sum h (W - T)^2 / 2,    G = h (W - T) + h e,    h = sqrt(s) / mean(sqrt(s))

W starts at 0, T is normal, and e is fresh normal noise at each step. Near the minimum, the second moment of G is
h^2, which is proportional to s: of rank 4, of rank 1, or without structure.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorascope.array_types import Float
from lorascope.papers.judging.truth_names import MOMENTS_RANK_1, MOMENTS_RANK_4, MOMENTS_UNSTRUCTURED

SIDE, STEPS = 128, 400


class Descent(NamedTuple):
    """Losses before each step, with the noise left out, and the loss at the end."""

    losses: list[float]
    final: float


def draw_moments(truth: str, generator: torch.Generator) -> Float[Tensor, "side side"]:
    """Draw s, the second moments up to a constant: sums of outer products, or independent entries."""

    def log_normal(*shape: int, deviation: float) -> Tensor:
        return torch.exp(deviation * torch.randn(shape, generator=generator))

    if truth == MOMENTS_UNSTRUCTURED:
        return log_normal(SIDE, SIDE, deviation=2.1)
    rank, deviation = {MOMENTS_RANK_4: (4, 2.0), MOMENTS_RANK_1: (1, 1.5)}[truth]
    return log_normal(SIDE, rank, deviation=deviation) @ log_normal(rank, SIDE, deviation=deviation)


def descend(method: Any, truth: str, seed: int, rate: float) -> Descent:
    """Minimize the quadratic of a seed with a method's optimizer, a linear decay to 0 and no weight decay."""
    generator = torch.Generator().manual_seed(seed)
    s = draw_moments(truth, generator)
    h = s.sqrt() / s.sqrt().mean()
    target = torch.randn(SIDE, SIDE, generator=generator)
    model = nn.Linear(SIDE, SIDE, bias=False)
    nn.init.zeros_(model.weight)  # the default start would differ between seeds
    optimizer = method.optimizer(model, rate, rate, 0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)

    def loss() -> float:
        return float((h * (model.weight.detach() - target) ** 2).sum() / 2)

    losses = []
    # The gradient is known, so there is no backward pass.
    for _ in range(STEPS):
        losses.append(loss())
        noise = torch.randn(SIDE, SIDE, generator=generator)
        model.weight.grad = h * (model.weight.detach() - target + noise)
        optimizer.step()
        schedule.step()
    final = loss()
    return Descent(losses, final if math.isfinite(final) else math.inf)
