"""What a training run depends on: W_0, and the plan from which its identity is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.method import Method, Phase, config
from lorascope.observe import Observer
from lorascope.run import SCHEMA, identify
from lorascope.settings import Settings
from lorascope.tasks import Task


class Base(Mapping[str, Tensor]):
    """W_0 as a read-only mapping parameter name -> tensor: copies of what trains, the living tensor for the rest."""

    def __init__(self, model: nn.Module) -> None:
        self._live = dict(model.named_parameters())
        self._kept: dict[str, Tensor] = {}

    def capture(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy what the optimizer is about to change."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._live.items():
            if id(parameter) in trained and name not in self._kept:
                self._kept[name] = parameter.detach().clone()

    def put_back(self) -> None:
        """Set the model to W_0 again."""
        with torch.no_grad():
            for name, tensor in self._kept.items():
                self._live[name].copy_(tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name] if name in self._kept else self._live[name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a phase depends on, and so its identity.

    Parameters
    ----------
    recipe, phase : Method, Phase
        What ``train`` was called with, and what runs now.
    task : Task
    settings : Settings
        With the rates and steps of this phase.
    seed : int
    w0_hash : str
        SHA-256 of the base's weights.
    observers : tuple of Observer
    """

    recipe: Method
    phase: Phase
    task: Task
    settings: Settings
    seed: int
    w0_hash: str
    observers: tuple[Observer, ...]

    def identity(self) -> dict[str, Any]:
        """The parts of the run id."""
        return {
            "method": config(self.phase.method),
            "phase": [self.phase.name, self.phase.split],
            "w0_hash": self.w0_hash,
            "data_hash": self.task.hash,
            "settings": self.settings.plain()
            | {"observers": [observer.config() for observer in self.observers]}
            | {"search_share": self.phase.method.search_share},
            "seed": self.seed,
            "schema": SCHEMA,
        }

    @property
    def id(self) -> str:
        """The run id."""
        return identify(self.identity())
