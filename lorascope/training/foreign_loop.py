"""Step, checks and metadata of a training that another loop runs: a Trainer, or the user's own."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import distributed, nn

from lorascope.adapters.delta import adapters, frozen_parameters
from lorascope.adapters.peft_layers import active_adapters, is_peft_layer, unreadable_adapters
from lorascope.files.printable import first_of
from lorascope.inputs.tasks import Task
from lorascope.methods.field_checks import default_if_none
from lorascope.methods.method import Method, Step
from lorascope.observe import kl, norms
from lorascope.observe.observer import Observer, require_observers
from lorascope.runs.manifest import Manifest
from lorascope.training.base_weights import Base
from lorascope.training.run_spec import circumstances

# Fields of a PEFT configuration that are not hyper-parameters.
_NOT_HYPERPARAMETERS = {
    "base_model_name_or_path",
    "peft_version",
    "revision",
    "inference_mode",
    "task_type",
    "peft_type",
    "auto_mapping",
}
_LOOPS = {"trainer": "Trainer", "loop": "PyTorch loop"}


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, base: Base, modules: pd.DataFrame, where: str) -> Step:
    """Return the Step of a foreign loop, which gives no access to batches, their loss or held-out text."""
    loss = partial(_fail, where, "the loss of a batch")
    search = partial(_fail, where, "the search split")
    text = partial(_fail, where, "held-out text")
    names = tuple(_active_names(model))
    return Step(-1, -1, model, optimizer, base, modules, loss, search, text, shows_text=False, adapter_names=names)


def _fail(where: str, source: str, *_: Any) -> Any:
    raise ValueError(f"cannot access {source} {where}; train with ls.train")


def foreign_observers(observe: Sequence[Observer] | None, keep: str | Path | Task | None) -> tuple[Observer, ...]:
    """Return the observers of a foreign loop, ``[norms()]`` by default, with ``kl`` if there is text to keep."""
    observers = default_if_none(observe, (norms(),))
    require_observers(observers)
    if keep is None:
        return tuple(observers)
    return (kl(keep=keep), *observers)  # alarms with a limit of it come later


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer of a foreign loop, without accelerate's wrapper if it has one."""
    return getattr(optimizer, "optimizer", optimizer)


def reject_distributed_stop(observers: Sequence[Observer]) -> None:
    """Raise a ValueError if an observer may stop a foreign loop of several processes: only the first one records."""
    names: list[str] = []
    for observer in observers:
        names += getattr(observer, "stop", ())
    if names and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(f"stop must be empty with several processes, of which only the first records, got {names}")


def warn_unreadable(model: nn.Module) -> None:
    """Warn that a foreign loop's adapters whose update is not a matrix are not recorded."""
    if unread := list(unreadable_adapters(model).items()):
        examples = first_of([f"{module} ({kind})" for module, kind in unread])
        warnings.warn(f"cannot record adapters whose update is not a matrix: {examples}", stacklevel=3)


def run_manifest(
    model: nn.Module,
    step: Step,
    observers: Sequence[Observer],
    method: Method | None,
    recipe: dict[str, Any],
    label: str,
    trained: Sequence[nn.Parameter],
    device: str,
    settings: Mapping[str, Any],
    **fields: Any,
) -> Manifest:
    """Return the content of ``run.json`` for a foreign loop; ``fields`` are those that depend on the loop.

    ``method`` is a method of lorascope or None; ``model`` may be a PEFT model.
    """
    group = step.optimizer.param_groups[0]
    # A scheduler of torch stores the base rate as initial_lr, and has already multiplied lr by its warm-up.
    common = {
        "lr": float(group.get("initial_lr", group["lr"])),
        "weight_decay": float(group.get("weight_decay", 0.0)),
        "observers": [observer.config() for observer in observers],
    }
    return Manifest(
        started=time.time_ns(),
        method=recipe,
        recipe=recipe,
        label=label,
        phase=["", "train"],
        task_type=_peft_task_type(model),
        task_kind="image" if getattr(step.model, "main_input_name", None) == "pixel_values" else None,
        left_out=unreadable_adapters(step.model),
        frozen=frozen_parameters(adapters(step.model, step.adapter_names)) or None,
        labels=_class_names(step),
        settings={**settings, **common},
        **circumstances(step, method, trained, device),
        **fields,
    )


def describe_recipe(model: nn.Module, step: Step, loop: str) -> tuple[dict[str, Any], str]:
    """Return the configuration of a foreign loop, which trains no method of lorascope, and its label.

    With PEFT this is the configuration of the active adapter, and of the first one if several are active.
    """
    rule = type(step.optimizer).__name__
    # PEFT's enumerations print as "PeftType.LORA", and configurations from a file contain plain strings.
    if not (active := _active_configs(model)):
        return {"name": loop, "rule": rule}, f"{_LOOPS[loop]}, {rule}"
    peft = next(iter(active.values()))
    # Read the defaults from the fields, because AdaLoraConfig() without arguments raises an error.
    default = {field.name: field.default for field in dataclasses.fields(peft)}
    kind = str(getattr(peft.peft_type, "value", peft.peft_type))
    recipe: dict[str, Any] = {"name": "peft", "kind": kind, "rule": rule}
    words = [f"PEFT {kind}"]
    for key, value in vars(peft).items():
        if isinstance(value, set):
            value = sorted(value)  # the order of a set differs between processes
        allowed = key not in _NOT_HYPERPARAMETERS and isinstance(value, int | float | str | list)
        if allowed and value != default.get(key):
            recipe[key] = value
            if isinstance(value, int | float):
                words.append(f"{key} {value}")
    if len(_configs(model)) > 1:
        recipe["adapters"] = list(active)
        words.append(f"adapter {' + '.join(active)}")
    return recipe, ", ".join(words)


def _peft_task_type(model: nn.Module) -> str | None:
    """Return the task type of the active adapter of a PEFT model, None without one."""
    config = next(iter(_active_configs(model).values()), None)
    kind = getattr(config, "task_type", None)
    if kind is None:
        return None
    return str(getattr(kind, "value", kind))


def _configs(model: Any) -> dict[str, Any]:
    return getattr(model, "peft_config", {})


def _active_configs(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's configurations of the active adapters by name, or all of them if no layer has an active one."""
    configs = _configs(model)
    active = _active_names(model)
    return {name: config for name, config in configs.items() if name in active} or configs


def _active_names(model: nn.Module) -> list[str]:
    """Return the names of PEFT's active adapters, in the order in which layers add them."""
    names: dict[str, None] = {}
    for layer in filter(is_peft_layer, model.modules()):
        names |= dict.fromkeys(active_adapters(layer))
    return list(names)


def _class_names(step: Step) -> list[str] | None:
    """Return the class names, or None if the head does not predict classes."""
    settings = getattr(step.model, "config", None)
    heads = step.modules[step.modules["role"] == "head"]["out_features"].tolist()
    classes = getattr(settings, "id2label", None) or {}
    # Every configuration of transformers has two classes by default, also that of a language model.
    if not heads or heads[-1] != len(classes) or heads[-1] == getattr(settings, "vocab_size", None):
        return None
    return [str(classes[number]) for number in sorted(classes)]
