"""Scores of the components of one trained state, each by its method's own arithmetic, and what removing them costs.

A state is, for every adapted module, its update as P (out, k), lambda (k,) and Q (k, in). Every function puts it on the
model in the form that a method scores, and takes it off again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorascope.ablation import ablation_scores
from lorascope.delta import Delta, attach, detach
from lorascope.methods import adalora, alora, autolora
from lorascope.replay import moved_losses

Rows = dict[str, dict[str, np.ndarray]]
"""Score -> module -> value of each component."""
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
Loss = Callable[[dict[str, Tensor]], Tensor]


def canonical(delta: Delta) -> Triple:
    """P (out, k), lambda (k,) and Q (k, in) of an update."""
    U, sigma, V = delta.update().svd()
    return U, sigma, V.T


def _dress(model: nn.Module, state: Mapping[str, Triple], kind: Callable[..., Any], fill: Callable[..., None]) -> Any:
    """Put the state on the model as Deltas of one kind."""
    deltas = {}
    for name, (P, sigma, Q) in state.items():
        delta = kind(model.get_submodule(name), len(sigma), 1.0)
        with torch.no_grad():
            fill(delta, *(torch.from_numpy(np.ascontiguousarray(part)).float() for part in (P, sigma, Q)))
        deltas[name] = delta
    attach(model, deltas)
    return deltas


def _fill_plain(delta: Any, P: Tensor, sigma: Tensor, Q: Tensor) -> None:
    delta.B.copy_(P * sigma)
    delta.A.copy_(Q)


def _fill_svd(delta: Any, P: Tensor, sigma: Tensor, Q: Tensor) -> None:
    delta.B.copy_(P)
    delta.diagonal.copy_(sigma[:, None])
    delta.A.copy_(Q)


def _fill_weighed(delta: Any, P: Tensor, sigma: Tensor, Q: Tensor) -> None:
    """With alpha = 1/k, as the logits begin, the update is what it was."""
    _fill_plain(delta, P, sigma * len(sigma), Q)


@torch.no_grad()
def loss_rises(
    model: nn.Module, loss: Loss, state: Mapping[str, Triple], batches: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Module -> mean rise of the loss with each component taken out, and last with the whole module taken out."""
    deltas = _dress(model, state, alora.ALoRADelta, _fill_plain)
    without = {
        name: [*(partial(delta.add_component, i, -1) for i in range(delta.rank)), partial(_take_off, delta)]
        for name, delta in deltas.items()
    }
    rises: dict[str, list[np.ndarray]] = {name: [] for name in deltas}
    for batch in batches:
        undisturbed, losses = moved_losses(model, loss, batch, without)
        for name, found in losses.items():
            rises[name].append(np.array(found) - undisturbed)
    detach(model)
    return {name: np.mean(found, axis=0) for name, found in rises.items()}


def _take_off(delta: Delta, x: Tensor, y: Tensor) -> Tensor:
    return y - delta(x)


def slopes(model: nn.Module, loss: Loss, state: Mapping[str, Triple], batches: Sequence[Any]) -> dict[str, np.ndarray]:
    """Module -> mean of lambda dL/dlambda of each component, and last their sum.

    To first order a rise is the negative of it. One pass back gives all of them, where a rise needs a pass of its own.
    """
    deltas = _dress(model, state, adalora.AdaLoRADelta, _fill_svd)
    diagonals = [delta.diagonal for delta in deltas.values()]
    total = [torch.zeros_like(diagonal) for diagonal in diagonals]
    for batch in batches:
        torch._foreach_add_(total, torch.autograd.grad(loss(batch), diagonals))
    detach(model)
    found = {}
    for (name, delta), gradient in zip(deltas.items(), total, strict=True):
        each = (delta.diagonal.detach() * gradient)[:, 0].double().numpy() / len(batches)
        found[name] = np.append(each, each.sum())
    return found


def settled_rises(
    model: nn.Module, loss: Loss, state: Mapping[str, Triple], batches: Sequence[Any], removed: int
) -> dict[str, np.ndarray]:
    """Rise of the loss on all batches with each component, and last the whole module, taken out: as ``loss_rises``.

    Components are removed on the first ``removed`` batches alone. What a removal does to first order differs from text
    to text by far the most, and is exchanged for what it is on all batches.
    """
    some, rest = batches[:removed], batches[removed:]
    rises = loss_rises(model, loss, state, some)
    if not rest:
        return rises
    here, there = (slopes(model, loss, state, part) for part in (some, rest))
    share = len(rest) / len(batches)
    return {name: rise + share * (here[name] - there[name]) for name, rise in rises.items()}


def adalora_scores(model: nn.Module, loss: Loss, state: Mapping[str, Triple], batches: Sequence[Any]) -> Rows:
    """Sensitivity, uncertainty and importance at zero learning rate, and the norm of the mean gradient."""
    deltas = _dress(model, state, adalora.AdaLoRADelta, _fill_svd)
    weights = [weight for delta in deltas.values() for weight in (delta.B, delta.diagonal, delta.A)]
    sensitivity, uncertainty, total = ([torch.zeros_like(weight) for weight in weights] for _ in range(3))
    default = adalora.AdaLoRA()
    for batch in batches:
        gradients = torch.autograd.grad(loss(batch), weights)
        with torch.no_grad():
            adalora.smooth(sensitivity, uncertainty, weights, list(gradients), (default.beta1, default.beta2))
            torch._foreach_add_(total, gradients)
    detach(model)
    rows: Rows = {
        name: {} for name in ("AdaLoRA importance", "AdaLoRA sensitivity", "AdaLoRA uncertainty", "gradient norm")
    }
    for place, name in enumerate(deltas):
        mine = slice(3 * place, 3 * place + 3)
        own, spread, (dP, dlambda, dQ) = sensitivity[mine], uncertainty[mine], total[mine]
        rows["AdaLoRA importance"][name] = adalora.importance(own, spread).sum(0)[0].numpy()
        rows["AdaLoRA sensitivity"][name] = own[1][:, 0].numpy()
        rows["AdaLoRA uncertainty"][name] = spread[1][:, 0].numpy()
        squares = dP.square().sum(0) + dlambda[:, 0].square() + dQ.square().sum(1)
        rows["gradient norm"][name] = (squares.sqrt() / len(batches)).numpy()
    return rows


def alora_scores(model: nn.Module, loss: Loss, state: Mapping[str, Triple], batch: Any) -> Rows:
    """IS and its two parts, higher where the component is needed more."""
    _dress(model, state, alora.ALoRADelta, _fill_plain)
    found = ablation_scores(model, loss, batch)
    detach(model)
    return {
        "ALoRA importance": {n: alora.importance(found.full, found.without[n], found.only[n]) for n in state},
        "ALoRA, without": {name: found.full - found.without[name] for name in state},
        "ALoRA, alone": {name: found.only[name] for name in state},
    }


def autolora_scores(model: nn.Module, loss: Loss, state: Mapping[str, Triple], batches: Sequence[Any]) -> Rows:
    """alpha after the logits alone have been trained, twice through the batches."""
    deltas = _dress(model, state, autolora.AutoLoRADelta, _fill_weighed)
    logits = [delta.logits.requires_grad_() for delta in deltas.values()]
    optimizer = torch.optim.Adam(logits, lr=1e-2, betas=autolora.BETAS)
    for batch in (*batches, *batches):
        for logit, gradient in zip(logits, torch.autograd.grad(loss(batch), logits), strict=True):
            logit.grad = gradient
        optimizer.step()
    detach(model)
    return {"AutoLoRA alpha": {name: delta.alpha.detach().numpy() for name, delta in deltas.items()}}
