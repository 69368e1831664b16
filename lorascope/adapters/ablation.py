"""Scores of a model with one component of its adapters off, or alone on (AB-LoRA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorascope.adapters.activation_patching import Batch, Loss, Move, moved_losses
from lorascope.adapters.delta import attach, attached_deltas, detach


@runtime_checkable
class Switchable(Protocol):
    """What is asked of a Delta: the number of its components, and what each of them adds."""

    @property
    def rank(self) -> int: ...

    def add_component(self, index: int, sign: int, x: Tensor, y: Tensor) -> Tensor:
        """The host's output ``y`` at input ``x`` with a component put on (sign 1) or taken off (-1)."""

    def is_idle(self, index: int) -> bool:
        """Does the component add nothing, whatever the input?"""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores S = -loss of one batch; the larger the better.

    Parameters
    ----------
    full, none : float
        With all components on, and with all of them off.
    without, only : mapping module -> array (rank,)
        With one component off and all others of the model on; with it on and all others of the model off.
    """

    full: float
    none: float
    without: Mapping[str, Float[np.ndarray, "_"]]
    only: Mapping[str, Float[np.ndarray, "_"]]


@torch.no_grad()
def ablation_scores(model: nn.Module, loss: Loss, batch: Batch) -> Scores:
    """Score every component of a model's adapters by taking it off, and by leaving it alone on.

    Parameters
    ----------
    model : Module
        All its Deltas are ``Switchable``. Its modes and adapters are put back.
    loss : function batch -> Tensor ()
        Calls the model; a mean over the rows of the batch.
    batch : dict of tensors (rows, ...)
    """
    gates: Any = attached_deltas(model)
    with _evaluation_mode(model):
        full, without = _switched_scores(model, loss, batch, gates, -1)
        deltas = detach(model)
        try:
            none, only = _switched_scores(model, loss, batch, gates, 1)
        finally:
            attach(model, deltas)
    return Scores(full, none, without, only)


def _switched_scores(
    model: nn.Module, loss: Loss, batch: Batch, gates: Mapping[str, Switchable], sign: int
) -> tuple[float, dict[str, Float[np.ndarray, "_"]]]:
    """Score of the model as it is, and with each component in turn put on or taken off."""
    active = {name: [i for i in range(gate.rank) if not gate.is_idle(i)] for name, gate in gates.items()}
    moves: dict[str, list[Move]] = {
        name: [partial(gates[name].add_component, index, sign) for index in indices] for name, indices in active.items()
    }
    undisturbed, losses = moved_losses(model, loss, batch, moves)
    scores = {name: np.full(gate.rank, -undisturbed) for name, gate in gates.items()}
    for name, indices in active.items():
        scores[name][indices] = [-value for value in losses[name]]
    return -undisturbed, scores


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no cache of keys and values, which nobody reads here."""
    modes = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    model.eval()
    if caches:
        config.use_cache = False
    try:
        yield
    finally:
        if caches:
            config.use_cache = caches
        for module, training in modes:
            module.training = training
