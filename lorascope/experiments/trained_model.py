"""Trained model of a run or an adapter, opened on its base: the weights without adapters, and the adapters apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, detach
from lorascope.adapters.host_weights import host_weight
from lorascope.adapters.quantization import quantize_blocks, require_bitsandbytes
from lorascope.adapters.weight_parts import find_host
from lorascope.experiments.component_removal import SvdTriple, svd_of_update
from lorascope.export import base_of
from lorascope.export.peft_folder import require_all_recorded
from lorascope.formats.stored_update import plain_name
from lorascope.inputs import models
from lorascope.inputs.classifier_head import fit_head, weights_hash
from lorascope.inputs.tasks import Task
from lorascope.methods.method import task_head
from lorascope.runs.adapter import Adapter
from lorascope.runs.lora_config import exact_products
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.schema.fused_parts import split_part_name
from lorascope.training.run_spec import reload_model, reload_task
from lorascope.training.settings import Settings
from lorascope.training.state import load_tensors
from lorascope.updates import Update


class TrainedModel(NamedTuple):
    """Base with all trained parameters except adapters, the task in the form of its head, and the detached Deltas."""

    base: nn.Module
    task: Task
    deltas: dict[str, Delta]


def open_components(run: Result, state: str) -> dict[str, SvdTriple]:
    """Return the singular value decomposition of every update of a run or an adapter.

    Raises
    ------
    ValueError
        There is no update, or one is not a product of two factors.
    """
    products = exact_products(run, run.updates(state=state))
    if not products:
        raise ValueError(f"{run.reference} has no low-rank updates, whose components could be removed")
    return {module: svd_of_update(update) for module, update in products.items()}


def open_trained(run: Result, name: str | Path, task: str | Path | Task, state: str) -> TrainedModel:
    """Open the trained model of a run on its base, with its adapters detached.

    The Deltas are the run's own, which compute bit by bit what they did in training. An adapter or a recording of
    another trainer has none.

    Raises
    ------
    ValueError
        The model is not the base, or trained parameters were not saved.
    """
    if not isinstance(task, Task):
        task = reload_task(run, str(task))
    base = reload_model(run, name, task, base_of(run)[1])
    deltas: dict[str, Delta] = {}
    if isinstance(run, Adapter) or run.meta.w0_hash is None:
        if isinstance(run, Adapter):
            stored = _adapter_weights(run)
        else:  # a recording of another trainer
            require_all_recorded(run, state)
            stored = {other: torch.tensor(array) for other, array in cast(Run, run).tensors(state).items()}
        _load_other_weights(run, stored, base, str(name))
        _check_hosts(run, run.updates(state=state), base, str(name))
    else:
        fit_head(base, run.meta.labels)
        if weights_hash(base) != run.meta.w0_hash:
            raise ValueError(
                f"model must be {run.meta.model}, the base of {run.reference}, got {name} with different weights"
            )
        if (kind := run.meta.settings.get("quantize")) is not None:
            require_bitsandbytes(kind)
            quantize_blocks(base, kind, "cpu")
        cast(Run, run).restore(base, state)
        deltas = detach(base, join=False)  # its parts of fused weights are patched by name
    base.requires_grad_(False)
    # Images are cropped as in the evaluations of the run.
    task = replace(task.fit(base), augment=run.meta.settings.get("augment", Settings.augment))
    return TrainedModel(base, task, deltas)


def _check_hosts(run: Result, updates: Mapping[str, Update], base: nn.Module, name: str) -> None:
    """Raise ValueError if names or shapes show that a model is not the base; its weights were not recorded."""
    modules = dict(base.named_modules())
    for module, update in updates.items():
        fused = (split_part_name(module) or (module,))[0]
        if fused not in modules:
            raise ValueError(f"model must be the base of {run.label}, got {name}: it has no {module}")
        shapes = update.shape, tuple(host_weight(find_host(base, module)).shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model must be the base of {run.label}, got {name}: {module} has shape {shapes[1]}, not {shapes[0]}"
            )


def _load_other_weights(run: Result, stored: Mapping[str, Tensor], base: nn.Module, name: str) -> None:
    """Load the parameters that trained in addition to the factors, usually a classifier head."""
    untrained = sorted(models.missing(base) - stored.keys())
    if untrained:
        raise ValueError(f"cannot measure the loss: neither {run.label} nor {name} has weights for {untrained[0]}")
    parameters = dict(base.named_parameters(remove_duplicate=False))
    for other, tensor in stored.items():
        if other in parameters and parameters[other].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in {run.label} and {tuple(parameters[other].shape)} in {name}"
            fix = "Pass the base model in the size of training (were tokens added?)"
            if other in task_head(base):
                fix = "Pass a task with the labels of the adapter"
            raise ValueError(f"cannot load {other}: it has shape {shapes}. {fix}")
    # A tied weight is loaded under its first name, and the second one must agree with it.
    tied = stored.keys() & parameters.keys() - dict(base.named_parameters()).keys()
    load_tensors(base, {other: tensor for other, tensor in stored.items() if other not in tied})
    for other in sorted(tied):
        if not torch.equal(parameters[other], stored[other].to(parameters[other])):
            raise ValueError(
                f"cannot load {other}: it is tied in {name}, but is separate in {run.label}. Pass an untied base"
            )


def _adapter_weights(run: Adapter) -> dict[str, Tensor]:
    """Return the parameters in an adapter folder other than the factors, by their names in the base."""
    if biased := [name for name in run.files.others if name.endswith(".lora_B.bias")]:
        raise ValueError(
            f"cannot measure components of {run.label}: {biased[0]} (lora_bias) is not part of any component"
        )
    tensors = {}
    for file in run.files.files:
        for name in file:
            other = plain_name(name)
            if other in run.files.others:
                # PEFT saves an adapted embedding with the adapter, as its base layer.
                tensors[other.replace(".base_layer.", ".")] = torch.tensor(file[name])
    return tensors
