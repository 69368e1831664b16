"""Base weights W_0 of a model that trains, and the marker of a model that was trained before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorascope.adapters.delta import attached_deltas
from lorascope.adapters.peft_layers import unwrap_peft_model, unwrapped_parameters
from lorascope.inputs.classifier_head import draw_new_weights, fit_head, weights_hash
from lorascope.inputs.tasks import Task
from lorascope.observe.trainable import adapters, unreadable_adapters

_MARK = "_lorascope_trained"


class Base(Mapping[str, Tensor]):
    """W_0 as a read-only mapping parameter name -> tensor: copies of what trains, the living tensor for the rest.

    Adapters are no part of it.
    """

    def __init__(self, model: nn.Module) -> None:
        adapters = {id(parameter) for delta in attached_deltas(model).values() for parameter in delta.parameters()}
        self._live = {name: p for name, p in unwrapped_parameters(model).items() if id(p) not in adapters}
        self.kept: dict[str, Tensor] = {}

    def capture(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy what the optimizer is about to change."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._live.items():
            if id(parameter) in trained and name not in self.kept:
                self.kept[name] = parameter.detach().clone()

    def restore(self) -> None:
        """Set the model to W_0 again."""
        with torch.no_grad():
            for name, tensor in self.kept.items():
                self._live[name].copy_(tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[name] if name in self.kept else self._live[name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)


class Mark(NamedTuple):
    """What ``train`` leaves on a module: which recipe it ran, and W_0."""

    recipe: str
    w0_hash: str
    base: Base

    def put_on(self, model: nn.Module, recipe: str) -> None:
        """Leave the mark on a module, for this recipe."""
        setattr(model, _MARK, self._replace(recipe=recipe))


def prepare_model(model: nn.Module, task: Task, seed: int) -> Mark:
    """Prepare a module for its first training; give back the mark of one that was trained before."""
    mark = getattr(model, _MARK, None)
    if mark is not None:
        return mark
    refuse_adapted(model)
    fit_head(model, task.labels if task.classifies else None)
    draw_new_weights(model, seed)
    return Mark("", weights_hash(model), Base(model))


def refuse_adapted(model: nn.Module) -> None:
    """Raise a ValueError where a model carries adapters, ours or PEFT's: it is no W_0."""
    bare_model = unwrap_peft_model(model)
    if carried := adapters(bare_model) | unreadable_adapters(bare_model):
        raise ValueError(f"the model carries adapters already ({next(iter(carried))} ...): train a freshly loaded one")
