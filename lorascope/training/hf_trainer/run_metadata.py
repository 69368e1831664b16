"""Metadata for ``run.json`` of a run under transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Subset
from transformers import TrainerState, TrainingArguments

from lorascope.methods.method import Step, config, trained_parameters
from lorascope.observe.observer import Observer
from lorascope.runs.manifest import Manifest
from lorascope.training.foreign_loop import describe_recipe, run_manifest
from lorascope.training.hf_trainer.method_callback import MethodCallback


def describe_run(
    args: TrainingArguments,
    state: TrainerState,
    trainer: dict[str, Any],
    step: Step,
    callback: MethodCallback | None,
    observers: Sequence[Observer],
    id: str,
) -> Manifest:
    """Return a Trainer's metadata for ``run.json``; ``args``, ``state`` and ``trainer`` are a callback's arguments."""
    trained = trained_parameters(step.optimizer)
    data = trainer["train_dataloader"].dataset
    fields: dict[str, Any] = {
        "id": id,
        "task": getattr(getattr(data, "info", None), "dataset_name", None) or type(data).__name__,
        "data_hash": getattr(data, "_fingerprint", None),
        "seed": args.seed,
    }
    if callback is None:
        method, clip = None, args.max_grad_norm or None
        recipe, label = describe_recipe(trainer["model"], step, "trainer")
        # An optimizer from PEFT may also contain frozen parameters.
        trained = [parameter for parameter in trained if parameter.requires_grad]
    else:
        method, clip = callback.method, callback.settings.clip
        recipe, label = config(method), method.label()
        fields |= {"w0_hash": callback.w0_hash, "facts": method.describe()}
    precision = "fp32"
    if args.bf16 or args.fp16:
        precision = "bf16" if args.bf16 else "fp16"
    settings = {
        "steps": state.max_steps,
        # Rows per optimizer step, of all processes together.
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup": float(args.get_warmup_steps(state.max_steps)),
        "clip": clip,
        "accumulate": args.gradient_accumulation_steps,
        "precision": precision,
    }
    device = str(args.device)
    return run_manifest(trainer["model"], step, observers, method, recipe, label, trained, device, settings, **fields)


def row_overlap(trained: Any, evaluated: Any) -> float | None:
    """Return the fraction of a Trainer's evaluation rows that are training rows, for the metadata, or None if unknown.

    Rows are not read, because reading some datasets draws random numbers. Two rows are the same if they have the same
    index in the same dataset, or are the same object in two lists. Datasets are compared by fingerprint or as objects,
    and a ``Subset`` by the dataset below it.
    """
    if isinstance(trained, list) and isinstance(evaluated, list):
        trained_ids = set(map(id, trained))
        return sum(id(row) in trained_ids for row in evaluated) / max(1, len(evaluated))
    (trained_origin, trained_rows), (evaluated_origin, rows) = _dataset_rows(trained), _dataset_rows(evaluated)
    if not rows or trained_origin != evaluated_origin:
        return None
    return len(set(trained_rows) & set(rows)) / len(rows)


def _dataset_rows(data: Any) -> tuple[Any, Sequence[int]]:
    """Return what identifies a dataset, and the indices of its rows."""
    if isinstance(data, Subset):
        origin, rows = _dataset_rows(data.dataset)
        if rows:
            rows = [rows[index] for index in data.indices]
        return origin, rows
    # An iterable dataset has no length, and so no indices.
    return getattr(data, "_fingerprint", None) or id(data), range(len(data)) if hasattr(data, "__len__") else ()
