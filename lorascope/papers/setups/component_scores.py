"""Importance scores of the components of a trained LoRA, computed with the code of each method.

``state`` contains the SVD factors of every update, as in ``component_removal``. Each function attaches them to the
model in the form that the method scores, and detaches them at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorascope.adapters.ablation import ablation_scores
from lorascope.adapters.activation_patching import Loss
from lorascope.adapters.delta import detach
from lorascope.experiments.component_removal import Triple, attach_components, fill_plain, fill_svd
from lorascope.methods import adalora, alora, autolora

Rows = dict[str, dict[str, np.ndarray]]
"""Name of a score -> module -> value of each component."""


def adalora_scores(model: nn.Module, loss: Loss, state: Mapping[str, Triple], batches: Sequence[Any]) -> Rows:
    """Compute AdaLoRA's importance, its sensitivity and uncertainty of lambda, and the norm of the mean gradient.

    The averages run over the batches at zero learning rate, with AdaLoRA's default betas.
    """
    deltas = attach_components(model, state, adalora.AdaLoRADelta, fill_svd)
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
        # Each module has three weights in a row: P (as B), lambda (as diagonal) and Q (as A).
        mine = slice(3 * place, 3 * place + 3)
        own, spread, (dP, dlambda, dQ) = sensitivity[mine], uncertainty[mine], total[mine]
        rows["AdaLoRA importance"][name] = adalora.importance(own, spread).sum(0)[0].numpy()
        rows["AdaLoRA sensitivity"][name] = own[1][:, 0].numpy()
        rows["AdaLoRA uncertainty"][name] = spread[1][:, 0].numpy()
        squares = dP.square().sum(0) + dlambda[:, 0].square() + dQ.square().sum(1)
        rows["gradient norm"][name] = (squares.sqrt() / len(batches)).numpy()
    return rows


def alora_scores(model: nn.Module, loss: Loss, state: Mapping[str, Triple], batch: Any) -> Rows:
    """Compute ALoRA's importance score and its two terms, signed so that higher means more important."""
    attach_components(model, state, alora.ALoRADelta, fill_plain)
    found = ablation_scores(model, loss, batch)
    detach(model)
    return {
        "ALoRA importance": {n: alora.importance(found.full, found.without[n], found.only[n]) for n in state},
        "ALoRA, without": {name: found.full - found.without[name] for name in state},
        "ALoRA, alone": {name: found.only[name] for name in state},
    }


def autolora_scores(model: nn.Module, loss: Loss, state: Mapping[str, Triple], batches: Sequence[Any]) -> Rows:
    """Compute AutoLoRA's alpha after training only the logits for two epochs over the batches."""

    def fill(delta: Any, P: Tensor, sigma: Tensor, Q: Tensor) -> None:
        fill_plain(delta, P, sigma * len(sigma), Q)  # leaves the update unchanged at the initial alpha = 1/k

    deltas = attach_components(model, state, autolora.AutoLoRADelta, fill)
    logits = [delta.logits.requires_grad_() for delta in deltas.values()]
    optimizer = torch.optim.Adam(logits, lr=1e-2, betas=autolora.BETAS)
    for batch in (*batches, *batches):
        for logit, gradient in zip(logits, torch.autograd.grad(loss(batch), logits), strict=True):
            logit.grad = gradient
        optimizer.step()
    detach(model)
    return {"AutoLoRA alpha": {name: delta.alpha.detach().numpy() for name, delta in deltas.items()}}
