"""Loss increase on given batches when components of a trained state are removed.

A state is, for every adapted module, the singular value decomposition of its update as P (out, k), lambda (k,) and
Q (k, in). Functions that measure losses attach it to the model, and detach it at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lorascope.adapters.activation_patching import Loss, moved_losses
from lorascope.adapters.delta import attach, detach
from lorascope.adapters.weight_parts import find_host
from lorascope.methods import adalora, alora
from lorascope.updates import Update


class SvdTriple(NamedTuple):
    """Singular value decomposition of an update for component removal: P (out, k), lambda (k,) and Q (k, in)."""

    P: np.ndarray
    sigma: np.ndarray
    Q: np.ndarray


def svd_of_update(update: Update) -> SvdTriple:
    """Return the singular value decomposition of an update, whose components can be removed."""
    U, sigma, V = update.svd()
    return SvdTriple(U, sigma, V.T)


def attach_components(
    model: nn.Module, state: Mapping[str, SvdTriple], kind: Callable[..., Any], fill: Callable[..., None]
) -> Any:
    """Attach the components to the model as Deltas of one kind, for their removal, and return these."""
    deltas = {}
    for name, triple in state.items():
        delta = kind(find_host(model, name), len(triple.sigma), 1.0)
        with torch.no_grad():
            fill(delta, *map(_to_float32, triple))
        deltas[name] = delta
    attach(model, deltas)
    return deltas


def _to_float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).float()


def fill_plain(delta: Any, P: Tensor, sigma: Tensor, Q: Tensor) -> None:
    """Fill a Delta of the form B A with components for removal."""
    delta.B.copy_(P * sigma)
    delta.A.copy_(Q)


def fill_svd(delta: Any, P: Tensor, sigma: Tensor, Q: Tensor) -> None:
    """Fill a Delta of the form B diag(lambda) A with components for removal."""
    delta.B.copy_(P)
    delta.diagonal.copy_(sigma[:, None])
    delta.A.copy_(Q)


@torch.no_grad()
def loss_increases(
    model: nn.Module, loss: Loss, state: Mapping[str, SvdTriple], batches: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Return module -> mean loss increase on removal of each component and, last, of the whole module."""
    deltas = attach_components(model, state, alora.ALoRADelta, fill_plain)
    without = {}
    for name, delta in deltas.items():
        without[name] = [partial(delta.add_component, i, -1) for i in range(delta.rank)]
        without[name].append(partial(lambda delta, x, y: y - delta(x), delta))
    increases: dict[str, list[np.ndarray]] = defaultdict(list)
    for batch in batches:
        undisturbed, moved = moved_losses(model, loss, batch, without)
        for name, values in moved.items():
            increases[name].append(np.array(values) - undisturbed)
    detach(model, join=False)
    return {name: np.mean(values, axis=0) for name, values in increases.items()}


def first_order_increases(
    model: nn.Module, loss: Loss, state: Mapping[str, SvdTriple], batches: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Return module -> first-order loss increase on removal of each component and, last, their sum.

    To first order, the loss increase on removal is the negative of it. One backward pass gives all of them, whereas the
    exact loss increases need one evaluation per component.
    """
    deltas = attach_components(model, state, adalora.AdaLoRADelta, fill_svd)
    diagonals = [delta.diagonal for delta in deltas.values()]
    total = list(map(torch.zeros_like, diagonals))
    for batch in batches:
        torch._foreach_add_(total, torch.autograd.grad(loss(batch), diagonals))
    detach(model, join=False)
    slopes = {}
    for (name, delta), gradient in zip(deltas.items(), total, strict=True):
        slope = (delta.diagonal.detach() * gradient)[:, 0].double().numpy() / len(batches)
        slopes[name] = np.append(slope, slope.sum())
    return slopes


def ablation_loss_increases(
    model: nn.Module, loss: Loss, state: Mapping[str, SvdTriple], batches: Sequence[Any], removed: int
) -> dict[str, np.ndarray]:
    """Return the loss increase on all batches on removal of each component and, last, of the module.

    Same format as ``loss_increases``. Components are removed only on the first ``removed`` batches. The first-order
    part of the loss increase varies most between texts, so it is replaced by its mean over all batches. If ``removed``
    is 0, only the first-order part is computed.
    """
    measured, remaining = batches[:removed], batches[removed:]
    if not measured:
        return {name: -slope for name, slope in first_order_increases(model, loss, state, remaining).items()}
    increases = loss_increases(model, loss, state, measured)
    if not remaining:
        return increases
    measured_slopes = first_order_increases(model, loss, state, measured)
    remaining_slopes = first_order_increases(model, loss, state, remaining)
    share = len(remaining) / len(batches)
    for name, rise in increases.items():
        rise += share * (measured_slopes[name] - remaining_slopes[name])
    return increases
