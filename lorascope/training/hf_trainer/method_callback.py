"""Trainer callback that calls the hooks of a method in the order of ``train``.

=========================  ===================================================================
event                      action
=========================  ===================================================================
``on_train_begin``         check the Trainer's arguments; restore the method's state on resume
``on_step_begin``          ``before_step``, before the first micro-batch
``on_pre_optimizer_step``  ``after_backward`` on the gradients of the whole batch, then clipping
``on_optimizer_step``      ``after_step``, while the gradients still exist
``on_save``                write the method's state into the Trainer's checkpoint
=========================  ===================================================================

Under DDP, all processes call the hooks on the same averaged gradients, and the first process writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from lorascope.inputs.classifier_head import weights_hash
from lorascope.methods.field_checks import default_if_none
from lorascope.methods.method import Method, trained_parameters
from lorascope.training.base_weights import Base, begin_training, reject_adapted
from lorascope.training.foreign_loop import step_of, unwrap_optimizer
from lorascope.training.hf_trainer.step_loss import observe_losses, running_trainer, step_loss
from lorascope.training.session import clip_gradients, nonfinite_reason
from lorascope.training.settings import Settings
from lorascope.training.sharded_weights import SHARDED, reject_sharded_weights
from lorascope.training.state import fingerprint, freeze, frozen_names, load_tree, save_tree

FILE = "lorascope-method.safetensors"
MARKER = "_lorascope_driver"  # attribute of a model that holds its callback
LOOP = "under a Trainer"


class MethodCallback(TrainerCallback):
    """Trainer callback that attaches a method to a freshly loaded model and calls its hooks.

    Of the settings only learning rates and clipping have an effect.
    """

    def __init__(self, method: Method, model: nn.Module, settings: Settings) -> None:
        reject_adapted(model)
        self.base = Base(model)
        self.method, self.settings = _only_phase(method, self.base), settings
        self.w0_hash = weights_hash(model)
        self.optimizer, modules = begin_training(self.method, model, self.base, settings)
        self.step = step_of(model, self.optimizer, self.base, modules, LOOP)
        self.norm: float | None = None
        self._step_pending = False
        # By this a recorder finds the callback: they share nothing but the model, in any order of the callbacks.
        setattr(model, MARKER, self)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **trainer: Any) -> None:
        """Check the Trainer, and restore the method's state if training resumes from a checkpoint."""
        name, method, optimizer = type(self.method).__name__, self.method, trainer["optimizer"]
        # The Trainer clips before on_pre_optimizer_step, in which the method may still edit the gradients.
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm must be 0 with {name}, got {args.max_grad_norm}: pass clip to trainer_kwargs instead"
            )
        # Loss scaling skips the optimizer steps whose gradients overflow, which the hooks cannot see.
        if args.fp16:
            raise ValueError(f"fp16 must be False with {name}, got True: use bf16=True instead")
        reject_sharded(trainer["model"], optimizer)
        if trainer["model"] is not self.step.model or unwrap_optimizer(optimizer) is not self.optimizer:
            raise ValueError(
                "cannot train a model or optimizer that is not from the trainer_kwargs call of this callback; pass the "
                "model and all results of one call, and no model_init"
            )
        self._losses = observe_losses(running_trainer())
        self.step.total, self.step.index = state.max_steps, state.global_step - 1
        if state.global_step:
            tree = read_checkpoint_file(args, state, FILE, self.optimizer)
            freeze(self.step.model, tree["frozen"])
            method.restore(tree["method"])
        if distributed.is_available() and distributed.is_initialized():
            # Each process has seeded its own generators: all use those of the first one.
            generators = [
                {key: value for key, value in method.state().items() if isinstance(value, np.random.Generator)}
            ]
            distributed.broadcast_object_list(generators, src=0)
            method.restore(generators[0])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **trainer: Any) -> None:
        """Call ``before_step``."""
        self._losses.clear()
        self.step.index = state.global_step
        self.method.before_step(self.step)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **trainer: Any) -> None:
        """Call ``after_backward`` on the gradients of the whole batch, then clip them."""
        self.method.after_backward(self.step)
        self.norm = clip_gradients(self.optimizer, self.settings.clip)
        loss = default_if_none(step_loss(self._losses), 0.0)
        if reason := nonfinite_reason(self.step, loss, self.norm, self.optimizer.param_groups[0]["lr"]):
            raise FloatingPointError(reason)
        self._step_pending = True

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **trainer: Any) -> None:
        """Call ``after_step``, once per step: a recorder may call this before the Trainer does."""
        if self._step_pending:
            self._step_pending = False
            self.method.after_step(self.step)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **trainer: Any) -> None:
        """Write the method's state into the Trainer's checkpoint."""
        tree = {"method": self.method.state(), "frozen": frozen_names(self.step.model)}
        write_checkpoint_file(args, state, FILE, self.optimizer, tree)


def _only_phase(method: Method, base: Base) -> Method:
    """Return the method of the only phase; raise a ValueError if it needs several phases or a search split."""
    use_train = "train with ls.train, then export"
    if problem := method.trainer_problem():
        raise ValueError(f"{problem}, or {use_train}")
    phase = next(method.phases(base))
    if phase.name or method.search_share:
        name, needs = type(method).__name__, "several phases" if phase.name else "a search split"
        raise ValueError(f"cannot train {name} under a Trainer: it needs {needs}; {use_train}")
    return phase.method


def reject_sharded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if the weights under a method callback are sharded, so that no process has all of them."""
    reject_sharded_weights(model)
    model_ids = set(map(id, model.parameters()))
    # FSDP and DeepSpeed flatten the parameters that they optimize, so these are not those of the model.
    if not model_ids.issuperset(map(id, trained_parameters(optimizer))):
        raise ValueError(f"cannot use an optimizer of sharded weights (FSDP or DeepSpeed): {SHARDED}")


def write_checkpoint_file(
    args: TrainingArguments, state: TrainerState, name: str, optimizer: torch.optim.Optimizer, tree: dict[str, Any]
) -> None:
    """Write a method's state into the Trainer's checkpoint of this step, in the first process only."""
    if state.is_world_process_zero:
        save_tree(_checkpoint(args, state) / name, tree | {"weights": fingerprint(optimizer)})


def read_checkpoint_file(
    args: TrainingArguments, state: TrainerState, name: str, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the method's state from the checkpoint at which the Trainer resumes; see ``write_checkpoint_file``.

    Raise a ValueError if the file is missing or belongs to other weights than those the Trainer loaded.
    """
    file = _checkpoint(args, state) / name
    if not file.exists():
        raise ValueError(
            f"cannot resume at step {state.global_step}: {file} is missing; use the original output_dir and callbacks"
        )
    tree = load_tree(file)
    if tree["weights"] != fingerprint(optimizer):
        raise ValueError(f"cannot resume with {file}: the Trainer loaded other weights; resume from {file.parent}")
    return tree


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
