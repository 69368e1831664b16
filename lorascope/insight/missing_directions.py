"""Gradient signal that the factors of an adapter cannot follow, with labels drawn from the model as its exact null.

A step of the factors changes the update by B X + Y A. It cannot follow a component of the gradient G_b (out, in) of a
block b of rows:

.. math::

    M_b = (I - U U^T) \\, G_b \\, (I - V V^T)

with orthonormal bases U (out, r) of the columns of B and V (in, r) of the rows of A. The blocks are in two halves. The
leading singular vectors of the mean of one half are tested on the blocks of the other one, see
``lorascope.analysis.rank_prices``. With labels drawn from the model's own predictions the expected gradient is 0. With
shuffled labels it is not, because they make a confident model less confident.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorascope.adapters.activation_patching import Batch
from lorascope.adapters.host_weights import orient_weight
from lorascope.adapters.weight_parts import WeightPart, stored_weight
from lorascope.analysis.rank_prices import ModuleSignal
from lorascope.array_types import Float, Int
from lorascope.inputs.tokenization import IGNORED, token_losses
from lorascope.observe.measured_rows import TaskLoss
from lorascope.updates import LowRank

DIRECTIONS = 6
"""Singular vectors of a module that are tested."""
REAL, CONTROL = "real", "control"
_MOST_ELEMENTS = 1 << 26  # of the weights whose mean gradients are in memory together: 256 MiB per mean
_NEGLIGIBLE = 1e-6  # of the largest singular value; the Gram matrix loses half of the digits


class Reach(NamedTuple):
    """Orthonormal bases of the columns of B and of the rows of A, along which the factors of a module can follow."""

    U: Float[Tensor, "out left"]
    V: Float[Tensor, "in right"]

    def project_out(self, G: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the part of a gradient that no step of the factors can follow."""
        outside = G - self.U @ (self.U.T @ G)
        return outside - (outside @ self.V) @ self.V.T


def reach_of(update: LowRank) -> Reach:
    """Return the reach of the factors of an update; those of a residual are the ones that train."""
    factors = update.to_factors()
    return Reach(_basis(factors["B"]), _basis(np.asarray(factors["A"]).T))


def _basis(factor: Float[np.ndarray, "side rank"]) -> Float[Tensor, "side k"]:
    factor = np.asarray(factor, dtype=np.float64)
    vectors, sigma, _ = np.linalg.svd(factor, full_matrices=False)
    # Columns of a factor that depend on each other, or are zero as before the first step, span less.
    used = sigma > max(factor.shape) * np.finfo(np.float64).eps * sigma.max(initial=0)
    return torch.from_numpy(np.ascontiguousarray(vectors[:, used]))


def draw_labels(
    logits: Float[Tensor, "rows *targets outputs"], labels: Int[Tensor, "rows *targets"], seed: int
) -> Int[Tensor, "rows *targets"]:
    """Sample labels of all targets from the predictions of the model; ignored positions stay ignored."""
    is_target = labels != IGNORED
    generator = torch.Generator(logits.device).manual_seed(seed)
    sample = labels.clone()
    # In float64, because probabilities of many classes would not add up to 1 in 16 bits.
    probabilities = logits.detach()[is_target].double().softmax(-1)
    sample[is_target] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return sample


def find_signals(
    model: nn.Module, updates: Mapping[str, LowRank], loss: TaskLoss, blocks: Sequence[Batch], bar: tqdm
) -> dict[str, dict[str, ModuleSignal]]:
    """Measure the gradient signal of every module, with real labels and with drawn ones.

    Parameters
    ----------
    model : Module
        Model in evaluation mode, with its adapters attached.
    updates : mapping module -> LowRank
    loss : TaskLoss
    blocks : sequence of batch
        Row blocks, of which the first half is compared with the second.
    bar : tqdm
        Progress bar, updated after each pass over a block.

    Returns
    -------
    dict kind of labels -> dict module -> ModuleSignal
    """
    signals: dict[str, dict[str, ModuleSignal]] = {REAL: {}, CONTROL: {}}
    for modules in _groups(model, updates):
        gradients = _BlockGradients(model, modules, loss, blocks, bar)
        means = gradients.means()
        halves = {}
        for (kind, half, module), mean in means.items():
            halves[kind, half, module] = _measured_half(mean.double(), reach_of(updates[module]))
        values: dict[tuple[str, int, str], list[_BlockValues]] = {key: [] for key in means}
        for kind, half, module, gradient in gradients:
            # The directions of one half are tested on the other one.
            values[kind, half, module].append(halves[kind, 1 - half, module].measure(gradient.double()))
        for kind, by_module in signals.items():
            for module in modules:
                by_module[module] = _signal([values[kind, half, module] for half in (0, 1)])
    return signals


def _groups(model: nn.Module, updates: Mapping[str, LowRank]) -> Iterator[list[str]]:
    """Yield groups of modules whose mean gradients fit into memory together."""
    group: list[str] = []
    elements = 0
    for module in updates:
        host: Any = model.get_submodule(module)
        if group and elements + host.weight.numel() > _MOST_ELEMENTS:
            yield group
            group, elements = [], 0
        group.append(module)
        elements += host.weight.numel()
    yield group


class _BlockGradients:
    """Gradients of the mean loss per target with respect to the weights of some modules, block by block.

    They are computed again for every iteration, because those of all blocks would not fit into memory.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[str], loss: TaskLoss, blocks: Sequence[Batch], bar: tqdm
    ) -> None:
        self.hosts: dict[str, Any] = {module: model.get_submodule(module) for module in modules}
        self.loss, self.blocks, self.bar = loss, blocks, bar
        self.scale = len(blocks) / float(loss.counts.sum())

    def __iter__(self) -> Iterator[tuple[str, int, str, Float[Tensor, "out in"]]]:
        """Yield kind of labels, half, module and gradient, for every block."""
        # The weight of a part is a new view at each access, so the fused weight gets the gradient.
        weights = [stored_weight(host) for host in self.hosts.values()]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            for index, block in enumerate(self.blocks):
                self.bar.update()
                half = int(index >= len(self.blocks) // 2)
                logits, labels = self.loss.target_logits(block)
                for kind, targets in ((REAL, labels), (CONTROL, draw_labels(logits, labels, index))):
                    total = token_losses(logits, targets).sum() * self.scale
                    gradients = torch.autograd.grad(
                        total, weights, retain_graph=kind == REAL, materialize_grads=True
                    )  # fmt: skip
                    for (module, host), gradient in zip(self.hosts.items(), gradients, strict=True):
                        if isinstance(host, WeightPart):
                            yield kind, half, module, host.take(orient_weight(host.fused, gradient))
                        else:
                            yield kind, half, module, orient_weight(host, gradient)
        finally:
            for weight in weights:
                weight.requires_grad_(False)

    def means(self) -> dict[tuple[str, int, str], Float[Tensor, "out in"]]:
        """Return the mean gradient of each half, by kind of labels, half and module."""
        # With an odd number of blocks, the second half has one more.
        middle = len(self.blocks) // 2
        sizes = middle, len(self.blocks) - middle
        means: dict[tuple[str, int, str], Tensor] = {}
        for kind, half, module, gradient in self:
            key = kind, half, module
            if key in means:
                means[key].add_(gradient, alpha=1 / sizes[half])
            else:
                means[key] = gradient / sizes[half]
        return means


class _BlockValues(NamedTuple):
    projections: Float[np.ndarray, "direction"]
    outside: float
    inside: float


class _MeasuredHalf(NamedTuple):
    """Mean gradient of one half, outside and inside the reach, and its leading directions outside."""

    outside: Float[Tensor, "out in"]
    inside: Float[Tensor, "out in"]
    U: Float[Tensor, "out k"]
    V: Float[Tensor, "in k"]

    def measure(self, gradient: Float[Tensor, "out in"]) -> _BlockValues:
        """Measure the gradient of a block of the other half along them.

        The directions and both parts are projected already, so that the gradient need not be.
        """
        projections = ((gradient @ self.V) * self.U).sum(0)
        outside, inside = torch.sum(gradient * self.outside), torch.sum(gradient * self.inside)
        return _BlockValues(projections.numpy(), float(outside), float(inside))


def _measured_half(mean: Float[Tensor, "out in"], reach: Reach) -> _MeasuredHalf:
    outside = reach.project_out(mean)
    return _MeasuredHalf(outside, mean - outside, *leading_directions(outside, DIRECTIONS))


def leading_directions(M: Float[Tensor, "out in"], number: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, "in k"]]:
    """Return the leading left and right singular vectors of a matrix, fewer if its rank is lower.

    The eigenvectors of the smaller Gram matrix are several times faster than a singular value decomposition.
    """
    if M.shape[0] < M.shape[1]:
        V, U = leading_directions(M.T, number)
        return U, V
    V = torch.linalg.eigh(M.T @ M)[1][:, -number:].flip(1)
    # The columns of U have the singular values as their lengths.
    U = M @ V
    sigma = U.norm(dim=0)
    used = sigma > _NEGLIGIBLE * sigma.max()
    return U[:, used] / sigma[used], V[:, used]


def _signal(halves: Sequence[Sequence[_BlockValues]]) -> ModuleSignal:
    projections, outside, inside = [], [], []
    for values in halves:
        projections.append(np.array([value.projections for value in values]))
        outside.append(np.array([value.outside for value in values]))
        inside.append(np.array([value.inside for value in values]))
    return ModuleSignal(tuple(projections), tuple(outside), tuple(inside))
