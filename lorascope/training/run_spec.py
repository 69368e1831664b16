"""What a training run depends on: W_0, the plan from which its identity is computed, and whether its folder is free."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from lorascope import __version__
from lorascope.adapters.delta import adapted
from lorascope.adapters.host_weights import host_kind
from lorascope.adapters.peft_layers import bare, bare_parameters, without_peft
from lorascope.files.safetensors_io import is_partial, write_json
from lorascope.inputs.classifier_head import draw_new_weights, fit_head, weights_hash
from lorascope.inputs.models import name_of
from lorascope.inputs.tasks import Task
from lorascope.methods.base import Method, Phase, config, task_head
from lorascope.observe import Observer
from lorascope.observe.trainable import adapters, left_out
from lorascope.runs.folders import MANIFESTS, read_manifest, remove_run
from lorascope.runs.layout import identify
from lorascope.runs.run import SCHEMA, TRAIN_AGAIN, Run
from lorascope.training.checkpoints import Checkpoints
from lorascope.training.settings import Settings

_MARK = "_lorascope_trained"


class StateRemoved(ValueError):
    """A finished run was found whose saved parameters were removed, so that the model cannot be set to them.

    Parameters
    ----------
    run : Run
    """

    def __init__(self, run: Run) -> None:
        super().__init__(f"cannot restore run {run.id}: its state was removed to save disk space. {TRAIN_AGAIN}")
        self.run = run


class Base(Mapping[str, Tensor]):
    """W_0 as a read-only mapping parameter name -> tensor: copies of what trains, the living tensor for the rest.

    Adapters are no part of it.
    """

    def __init__(self, model: nn.Module) -> None:
        adapters = {id(parameter) for delta in adapted(model).values() for parameter in delta.parameters()}
        self._live = {name: p for name, p in bare_parameters(model).items() if id(p) not in adapters}
        self.kept: dict[str, Tensor] = {}

    def capture(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy what the optimizer is about to change."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._live.items():
            if id(parameter) in trained and name not in self.kept:
                self.kept[name] = parameter.detach().clone()

    def put_back(self) -> None:
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
        "hosts": {name: host_kind(bare(model.get_submodule(name))) for name in adapters(model)},
        "modules": modules.astype(object).where(modules.notna(), None).to_dict("records"),
    }


def _commit() -> str | None:
    """Git commit of the caller's folder, None outside a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.decode("ascii").strip() or None


class Mark(NamedTuple):
    """What ``train`` leaves on a module: which recipe it ran, and W_0."""

    recipe: str
    w0_hash: str
    base: Base

    def put_on(self, model: nn.Module, recipe: str) -> None:
        """Leave the mark on a module, for this recipe."""
        setattr(model, _MARK, self._replace(recipe=recipe))


def first_use(model: nn.Module, task: Task, seed: int) -> Mark:
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
    bare_model = without_peft(model)
    if carried := adapters(bare_model) | left_out(bare_model):
        raise ValueError(f"the model carries adapters already ({next(iter(carried))} ...): train a freshly loaded one")


def claim(folder: Path, recipe: str, overwrite: bool) -> None:
    """Make sure that a folder is free, or holds the recipe of this id."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    if not any((folder / name).exists() for name in MANIFESTS):
        if folder.exists() and not all(is_partial(child) for child in folder.iterdir()):
            hint = "so overwrite=True will not remove it: give" if overwrite else "give"
            raise ValueError(f"{folder} is not empty and holds no run, {hint} another folder")
    elif overwrite:
        remove_run(folder)
    else:
        try:
            found = read_manifest(folder)
        except ValueError as error:
            raise ValueError(f"{folder} does not hold a run of lorascope: give another folder ({error})") from error
        if found.id != recipe:
            raise ValueError(f"{folder} holds recipe {found.id}, not {recipe}: give another folder, or overwrite=True")


def note_phases(folder: Path, plan: Plan, names: Sequence[str], status: str) -> None:
    """Write down which phases of a recipe have begun; ``status`` is "running" or "done"."""
    for left in folder.glob(".recipe.json.*"):
        if is_partial(left):
            left.unlink()
    write_json(folder / "recipe.json", {"id": plan.id, "status": status, "phases": list(names)})


def finished_run(path: Path, plan: Plan) -> Run | None:
    """The finished run of this plan in a folder; None where it is yet to be trained or to be gone on with."""
    if not (path / "run.json").exists():
        return None
    run = Run.read(path)
    if run.id != plan.id:
        raise ValueError(f"{path} holds run {run.id}, not {plan.id}: give another folder, or overwrite=True")
    if not run.finished:
        return None
    Checkpoints(path).remove()  # left where the removal was cut short
    return run
