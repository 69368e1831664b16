"""What ``run.json`` says of a training that transformers' Trainer does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Subset
from transformers import TrainerState, TrainingArguments

from lorascope.methods.base import Step, config, frozen_entries
from lorascope.observe.base import Observer
from lorascope.observe.trainable import unreadable_adapters
from lorascope.runs.run import SCHEMA
from lorascope.training.hf_trainer.method_callback import MethodCallback
from lorascope.training.run_spec import circumstances
from lorascope.training.session import trained_parameters

# Of a PEFT configuration, what is no hyper-parameter.
_ASIDE = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_type", "auto_mapping"}


def describe_run(
    args: TrainingArguments,
    state: TrainerState,
    trainer: dict[str, Any],
    step: Step,
    driver: MethodCallback | None,
    observers: Sequence[Observer],
) -> dict[str, Any]:
    """All but the id.

    Parameters
    ----------
    args, state, trainer
        As a callback gets them.
    step : Step
    driver : MethodCallback or None
    observers : sequence of Observer
    """
    trained = trained_parameters(step.optimizer)
    if driver is None:  # an optimizer of PEFT's may hold what is frozen, too
        trained = [parameter for parameter in trained if parameter.requires_grad]
    still = 0 if driver is None else frozen_entries(driver.method)
    recipe, label = _recipe(trainer["model"], step) if driver is None else _method_entry(driver)
    data = trainer["train_dataloader"].dataset
    return circumstances(step.model, trained, still, step.modules, str(args.device)) | {
        "schema": SCHEMA,
        "started": time.time_ns(),
        "method": recipe,
        "recipe": recipe,
        "label": label,
        "phase": ["", "train"],
        "task_type": _task_type(trainer["model"]),
        "task_kind": "image" if getattr(step.model, "main_input_name", None) == "pixel_values" else None,
        "left_out": unreadable_adapters(step.model),
        "task": _dataset_name(data),
        "labels": _class_names(step),
        "data_hash": getattr(data, "_fingerprint", None),
        "w0_hash": None if driver is None else driver.w0_hash,
        "settings": _trainer_settings(args, state, step, driver) | {"observers": [o.config() for o in observers]},
        "seed": args.seed,
        "total_seconds": 0.0,
    }


def overlap(trained: Any, evaluated: Any) -> float | None:
    """Share of the evaluation rows that are training rows; None where no row can be told without reading it.

    Rows are not read, since a data set may draw at random when it is. Two are the same if they stand at one place of
    one data set, by itself, by its fingerprint or below a ``Subset``, or are one object in two lists.
    """
    if isinstance(trained, list) and isinstance(evaluated, list):
        known = {id(row) for row in trained}
        return sum(id(row) in known for row in evaluated) / max(1, len(evaluated))
    (one, rows), (other, asked) = _dataset_rows(trained), _dataset_rows(evaluated)
    return len(set(rows) & set(asked)) / max(1, len(asked)) if one == other else None


def _dataset_rows(data: Any) -> tuple[Any, Sequence[int]]:
    """Which data set it is, and which of its rows."""
    if isinstance(data, Subset):
        origin, rows = _dataset_rows(data.dataset)
        return origin, [rows[index] for index in data.indices] if rows else []
    return getattr(data, "_fingerprint", None) or id(data), range(len(data)) if hasattr(data, "__len__") else ()


def _trainer_settings(
    args: TrainingArguments, state: TrainerState, step: Step, driver: MethodCallback | None
) -> dict[str, Any]:
    group = step.optimizer.param_groups[0]
    return {
        "steps": state.max_steps,
        "lr": float(group.get("initial_lr", group["lr"])),
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup": float(args.get_warmup_steps(state.max_steps)),
        "clip": (args.max_grad_norm or None) if driver is None else driver.settings.clip,
        "weight_decay": float(group.get("weight_decay", 0.0)),
        "accumulate": args.gradient_accumulation_steps,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
    }


def _method_entry(driver: MethodCallback) -> tuple[dict[str, Any], str]:
    return config(driver.method), driver.method.label()


def _recipe(model: Any, step: Step) -> tuple[dict[str, Any], str]:
    """What trains, where it is none of our methods, and the same in words."""
    rule = type(step.optimizer).__name__
    if not hasattr(model, "peft_config"):
        return {"name": "trainer", "rule": rule}, f"Trainer, {rule}"
    peft = next(iter(model.peft_config.values()))
    default = {field.name: field.default for field in dataclasses.fields(peft)}  # AdaLoRA's cannot be built of nothing
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in vars(peft).items()}
    told = {
        key: value
        for key, value in values.items()
        if key not in _ASIDE and isinstance(value, int | float | str | list) and value != default.get(key)
    }
    kind = str(getattr(peft.peft_type, "value", peft.peft_type))
    numbers = [f"{key} {value}" for key, value in told.items() if isinstance(value, int | float)]
    return {"name": "peft", "kind": kind, "rule": rule} | told, ", ".join([f"PEFT {kind}", *numbers])


def _task_type(model: Any) -> str | None:
    """What PEFT was told the model does."""
    told = next((each.task_type for each in getattr(model, "peft_config", {}).values()), None)
    return None if told is None else str(getattr(told, "value", told))


def _class_names(step: Step) -> list[str] | None:
    """Names of the classes, where the head is over classes."""
    settings = getattr(step.model, "config", None)
    heads = step.modules[step.modules["role"] == "head"]["out_features"].tolist()
    classes = getattr(settings, "id2label", None) or {}
    if not heads or heads[-1] != len(classes) or heads[-1] == getattr(settings, "vocab_size", None):
        return None
    return [str(classes[number]) for number in sorted(classes)]


def _dataset_name(data: Any) -> str:
    """What a data set calls itself, or else its class."""
    return getattr(getattr(data, "info", None), "dataset_name", None) or type(data).__name__
