"""Ablation scores of adapter components: one component disabled, or only one enabled (AB-LoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lorascope.adapters.activation_patching import Batch, Loss, Move, moved_losses
from lorascope.adapters.delta import attach, attached_deltas, detach
from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.array_types import Float


class Scores(NamedTuple):
    """Ablation scores S = -loss of one batch; higher is better.

    ``full`` and ``none`` are with all components enabled and with all disabled. ``without`` and ``only`` have one value
    per component by module: disabled while all others are enabled, and enabled while all others are disabled.
    """

    full: float
    none: float
    without: Mapping[str, Float[np.ndarray, "_"]]
    only: Mapping[str, Float[np.ndarray, "_"]]


@torch.no_grad()
def ablation_scores(model: nn.Module, loss: Loss, batch: Batch) -> Scores:
    """Compute ablation scores of every adapter component of a model: disable it, and enable only it.

    The Deltas of the model must have ``add_component`` and ``is_idle``, as those of ALoRA. ``loss`` calls the model and
    returns its mean loss over the rows of a batch. Training modes and adapters are restored.
    """
    adapters: Any = attached_deltas(model)
    with evaluation_mode(model):
        full, without = _switched_scores(model, loss, batch, adapters, -1)
        deltas = detach(model, join=False)
        try:
            # Now each component is added to the base model.
            none, only = _switched_scores(model, loss, batch, adapters, 1)
        finally:
            attach(model, deltas)
    return Scores(full, none, without, only)


def _switched_scores(
    model: nn.Module, loss: Loss, batch: Batch, adapters: Mapping[str, Any], sign: int
) -> tuple[float, dict[str, Float[np.ndarray, "_"]]]:
    """Return the score of the model as it is, and its scores with each component added or removed."""
    active: dict[str, list[int]] = {}
    moves: dict[str, list[Move]] = {}
    for name, adapter in adapters.items():
        active[name] = [index for index in range(adapter.rank) if not adapter.is_idle(index)]
        moves[name] = [partial(adapter.add_component, index, sign) for index in active[name]]
    undisturbed, losses = moved_losses(model, loss, batch, moves)
    scores = {}
    for name, adapter in adapters.items():
        # Idle components change nothing, so they have the score of the undisturbed model.
        scores[name] = np.full(adapter.rank, -undisturbed)
        scores[name][active[name]] = np.negative(losses[name])
    return -undisturbed, scores
