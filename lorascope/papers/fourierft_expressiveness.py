"""Expressiveness of LoRA and FourierFT with 128 parameters, on a toy classification task.

Is a sparse spectrum more expressive than a product of rank 1 with as many parameters? A small network with random,
frozen weights classifies points in the plane, eight clusters on a circle. Only an adapter of its middle layer (64 x 64)
trains: LoRA of rank 1, or FourierFT with 128 coefficients. If the Fourier basis is more expressive, FourierFT
classifies all points correctly and LoRA does not. A random basis with 128 coefficients separates the effect of the
frequencies from the effect of an update of rank above 1.

Source: FourierFT (arXiv 2405.03003), appendix C.2 with figure 7.

Departs:

- The paper states neither the points nor the other trained layers nor the learning rates.
- The clusters have centers on a circle of radius 5, with 30 points and a standard deviation of 0.5 each.
- The first and the last layer are frozen, and the middle layer keeps its random base weight, as in fine-tuning.
- LoRA has two learning rates; the better one of each seed is judged.
- 1000 epochs; the figure has 2000.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lorascope.array_types import Float, Int
from lorascope.updates import fourier

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from torch import Tensor, nn

    from lorascope.adapters.delta import Delta

CLASSES, POINTS, CENTER, NOISE = 8, 30, 5.0, 0.5
WIDTH, COEFFICIENTS = 64, 128
EPOCHS = 1000
_ALPHA, _ENTRY_SEED, _MIDDLE = 300.0, 777, "2"  # FourierFT's alpha and entry seed, and the name of the middle layer
FOURIER, RANDOM = "FourierFT", "random basis"
SLOW, FAST = "LoRA, rank 1, lr 0.01", "LoRA, rank 1, lr 0.1"


class Points(NamedTuple):
    """Points in the plane and their classes, to test expressiveness."""

    x: Float[Tensor, "points 2"]
    y: Int[Tensor, "points"]


class Course(NamedTuple):
    """Course of an expressiveness run: accuracy after each epoch, starting before the first, and the final network."""

    accuracy: list[float]
    network: nn.Sequential

    @property
    def epochs(self) -> int:
        """Epochs until all points were classified correctly, or all epochs if that did not happen."""
        return len(self.accuracy) - 1


def points(seed: int) -> Points:
    """Draw the clusters on which expressiveness is tested; their centers are on a circle."""
    import torch

    angle = 2 * torch.pi * torch.arange(CLASSES) / CLASSES
    centers = CENTER * torch.stack([angle.cos(), angle.sin()], dim=1)
    noise = NOISE * torch.randn(CLASSES, POINTS, 2, generator=torch.Generator().manual_seed(seed))
    return Points((centers[:, None] + noise).flatten(0, 1), torch.arange(CLASSES).repeat_interleave(POINTS))


def network(seed: int) -> nn.Sequential:
    """Build the network whose expressiveness is tested: three random, frozen layers; the middle one has no bias."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):  # keeps the global generator unchanged
        torch.manual_seed(seed)
        middle = nn.Linear(WIDTH, WIDTH, bias=False)
        model = nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), middle, nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    return model.requires_grad_(False)


def _new_lora_delta(seed: int) -> Delta:
    import torch
    from torch import nn

    from lorascope.methods.lora import LoRADelta

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoRADelta(nn.Linear(WIDTH, WIDTH), rank=1)


def _coefficients(seed: int) -> tuple[Float[Tensor, "n"], Int[Tensor, "2 n"]]:
    import torch

    entries = torch.from_numpy(fourier.entries((WIDTH, WIDTH), COEFFICIENTS, _ENTRY_SEED))
    return torch.randn(COEFFICIENTS, generator=torch.Generator().manual_seed(seed)), entries


def _new_fourier_delta(seed: int) -> Delta:
    from lorascope.methods.fourierft import FourierDelta

    return FourierDelta(*_coefficients(seed), (WIDTH, WIDTH), _ALPHA)


def _new_random_delta(seed: int) -> Delta:
    from lorascope.methods.fourierft import BasisDelta

    return BasisDelta(*_coefficients(seed), *fourier.bases((WIDTH, WIDTH), seed, "random"), _ALPHA)


ADAPTERS: dict[str, tuple[Callable[[int], Delta], float]] = {
    FOURIER: (_new_fourier_delta, 1e-2),
    RANDOM: (_new_random_delta, 1e-2),
    SLOW: (_new_lora_delta, 1e-2),
    FAST: (_new_lora_delta, 1e-1),
}
"""Label -> function that builds an adapter for a seed, and its learning rate."""


def learn(label: str, seed: int, epochs: int = EPOCHS) -> Course:
    """Train one adapter to test expressiveness, with full-batch Adam until all points are right or the epochs end."""
    import torch
    import torch.nn.functional as F

    from lorascope.adapters.delta import attach

    make, rate = ADAPTERS[label]
    model, (x, y) = network(seed), points(seed)
    delta = make(seed)
    attach(model, {_MIDDLE: delta})
    optimizer = torch.optim.Adam(delta.parameters(), lr=rate)
    accuracy: list[float] = []
    while True:  # the accuracy of the last update needs one more pass than there are updates
        logits = model(x)
        accuracy.append(float((logits.argmax(dim=1) == y).float().mean()))
        if accuracy[-1] == 1.0 or len(accuracy) > epochs:
            return Course(accuracy, model)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, y).backward()
        optimizer.step()
