"""Specification of a run: everything its identity is computed from, and what `run.json` says of it."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from lorascope import __version__
from lorascope.adapters.host_weights import host_kind
from lorascope.adapters.peft_layers import unwrap_peft_layer
from lorascope.inputs.models import name_of
from lorascope.inputs.tasks import Task
from lorascope.methods.base import Method, Phase, config, task_head
from lorascope.observe import Observer
from lorascope.observe.trainable import adapters
from lorascope.runs.layout import identify
from lorascope.runs.run import SCHEMA, Run
from lorascope.training.settings import Settings


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
            "settings": self.settings.to_dict()
            | {"observers": [observer.config() for observer in self.observers]}
            | {"search_share": self.phase.method.search_share},
            "seed": self.seed,
            "schema": SCHEMA,
        }

    @property
    def id(self) -> str:
        """The run id."""
        return identify(self.identity())

    def meta(
        self,
        model: nn.Module,
        trained: Sequence[nn.Parameter],
        still: int,
        modules: pd.DataFrame,
        parents: list[Run],
        device: str,
    ) -> dict[str, Any]:
        """What ``run.json`` holds while the run is on its way; ``still`` entries of what trains never change."""
        own = {
            "id": self.id,
            "recipe": config(self.recipe),
            "label": self.recipe.label(),
            "task": self.task.name,
            "task_kind": self.task.kind,
            "labels": list(self.task.labels) if self.task.classifies else None,
            "parents": [f"../{run.path.name}" for run in parents if run.path],
            "total_seconds": sum(run.meta["seconds"] for run in parents),
        }
        return self.identity() | circumstances(model, trained, still, modules, device) | own


def circumstances(
    model: nn.Module, trained: Sequence[nn.Parameter], still: int, modules: pd.DataFrame, device: str
) -> dict[str, Any]:
    """What ``run.json`` holds of a run on its way, whoever trains; ``still`` entries of what trains never change."""
    head = {id(parameter) for parameter in task_head(model).values()}
    return {
        "model": name_of(model),
        "versions": {"lorascope": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": _commit(),
        "device": device,
        "status": "running",
        "parents": [],
        "checksums": {},
        "states": {},
        "test": {},
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in trained) - still,
            "head": sum(p.numel() for p in trained if id(p) in head),
        },
        "hosts": {name: host_kind(unwrap_peft_layer(model.get_submodule(name))) for name in adapters(model)},
        "modules": modules.astype(object).where(modules.notna(), None).to_dict("records"),
    }


def _commit() -> str | None:
    """Git commit of the caller's folder, None outside a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.decode("ascii").strip() or None
