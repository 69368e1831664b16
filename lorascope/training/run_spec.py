"""Specification of a run: the inputs of its identity, and its metadata for ``run.json``."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorascope import __version__
from lorascope.adapters.delta import adapters
from lorascope.adapters.host_weights import entry_count, host_kind
from lorascope.adapters.peft_layers import unwrap_peft_layer
from lorascope.adapters.weight_parts import part_rows
from lorascope.inputs import models, tasks
from lorascope.inputs.tasks import Task
from lorascope.methods.method import Method, Phase, Step, config, task_head, trained_parameters
from lorascope.observe import Observer
from lorascope.runs.layout import identify
from lorascope.runs.manifest import SCHEMA, Fork, Manifest, Parameters, Start, describe_modules
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.training.processor import processor_name
from lorascope.training.settings import Settings


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """Specification of one phase: everything that its run id is computed from.

    ``recipe`` is the method that was passed to ``train``; ``settings`` have the learning rates and steps of the phase.
    In a fork, ``fork`` is its origin, and ``rows`` the task whose training rows replace those of ``task``. ``start`` is
    the run from whose adapter the training starts. ``weight_parts`` are the roles of adapted parts of fused weights.
    """

    recipe: Method
    phase: Phase
    task: Task
    settings: Settings
    seed: int
    w0_hash: str
    observers: tuple[Observer, ...]
    rows: Task | None = None
    fork: Fork | None = None
    start: Start | None = None
    weight_parts: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """Return the values that the run id is computed from."""
        identity = {
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
        # Only for forks, because other runs keep the ids that they had before there were any.
        if self.fork is not None:
            identity["fork"] = dataclasses.asdict(self.fork)
        if self.start is not None:
            identity["start"] = dataclasses.asdict(self.start)
        # An old run with the same targets adapted the whole weights.
        if self.weight_parts:
            identity["weight_parts"] = list(self.weight_parts)
        return identity

    @property
    def id(self) -> str:
        """Run id."""
        return identify(self.identity())

    def meta(self, step: Step, method: Method, parents: list[Run], device: str) -> Manifest:
        """Return ``run.json`` of a running phase, whose own copy of its method is ``method``."""
        facts, identity = self.phase.method.describe(), self.identity()
        identity.pop("weight_parts", None)  # the circumstances have it
        if self.start is not None:
            facts["starts_at_zero"] = False
        return Manifest(
            id=self.id,
            recipe=config(self.recipe),
            label=self.recipe.label(),
            task=self.task.name,
            task_kind=self.task.kind,
            task_options=dict(self.task.options) or None,
            selected_on_test=self.task.selected_on_test or None,
            labels=None if self.task.head_labels is None else list(self.task.head_labels),
            parents=[f"../{run.path.name}" for run in parents if run.path],
            total_seconds=sum(run.meta.seconds for run in parents),
            facts=facts,
            **identity | {"fork": self.fork, "start": self.start},
            **circumstances(step, method, trained_parameters(step.optimizer), device),
        )


def phase_rows(task: Task, phase: Phase, model: nn.Module | None = None, max_length: int = 128) -> int:
    """Return the number of rows that a phase trains on; with a model, windows of contexts count instead of rows."""
    count = 0
    for split in phase.split.split("+"):
        rows = task.split(split, float(phase.method.search_share))
        if model is not None and task.kind == "span":
            count += len(task.encode(models.processor(model), rows, max_length))
        else:
            count += len(rows)
    return count


def reload_task(run: Result, name: str) -> Task:
    """Load a task by name: with the splits and columns that the run had, if it is the task of the run."""
    options = run.meta.task_options or {}
    return tasks.load(name, **options) if name == run.meta.task else tasks.load(name)


def reload_model(run: Result, name: str | Path, task: Task | None = None, blocks: int | None = None) -> nn.Module:
    """Load the base of a run by its name or from a folder, with the options and the dtype that the run had."""
    settings: dict[str, Any] = {}
    if isinstance(run, Run):
        settings = run.meta.settings
    dtype = settings.get("dtype", "float32")
    return models.load(name, task, blocks, settings.get("model_options"), dtype)


def circumstances(step: Step, method: Method | None, trained: Sequence[nn.Parameter], device: str) -> dict[str, Any]:
    """Return the part of a run's specification in ``run.json`` that ``train`` and a Trainer share."""
    model = step.model
    head = set(map(id, task_head(model).values()))
    trained_count = sum(p.numel() for p in trained)
    if method is not None:
        trained_count -= method.frozen_entry_count()
    # The commit of the user's repository, in which the process runs; empty outside a repository.
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, check=False).stdout.decode("ascii")
    except FileNotFoundError:  # git is not installed
        commit = ""
    return {
        "model": models.name_of(model),
        "versions": {"lorascope": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "commit": commit.strip() or None,
        "device": device,
        "processor": processor_name() or None,
        "status": "running",
        "parameters": Parameters(
            total=sum(map(entry_count, model.parameters())),
            trained=trained_count,
            head=sum(p.numel() for p in trained if id(p) in head),
        ),
        "hosts": {name: host_kind(unwrap_peft_layer(model.get_submodule(name))) for name in adapters(model)},
        "weight_parts": part_rows(model) or None,
        "modules": describe_modules(step.modules),
    }
