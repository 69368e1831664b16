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

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorascope.inputs.classifier_head import weights_hash
from lorascope.methods.base import Method, Step
from lorascope.methods.neft import NeFT
from lorascope.schema import module_table
from lorascope.training.base_weights import Base, reject_adapted
from lorascope.training.session import clip_gradients, nonfinite_reason
from lorascope.training.settings import Settings
from lorascope.training.state import fingerprint, load_tree, save_tree

FILE = "lorascope-method.safetensors"
_MARKER = "_lorascope_driver"
_USE_TRAIN = "train with ls.train, then export"


class MethodCallback(TrainerCallback):
    """Trainer callback that attaches a method to a model and calls its hooks.

    Parameters
    ----------
    method : Method
        Method with one phase.
    model : Module
        Freshly loaded model that was not passed to a Trainer yet.
    settings : Settings
        Learning rates and clipping.
    """

    def __init__(self, method: Method, model: nn.Module, settings: Settings) -> None:
        reject_adapted(model)
        self.base = Base(model)
        self.method, self.settings = _only_phase(method, self.base), settings
        self.w0_hash = weights_hash(model)
        modules = module_table.describe(model)
        self.method.attach(model)
        self.optimizer = self.method.optimizer(model, settings.lr, settings.head_lr, settings.weight_decay)
        self.base.capture(self.optimizer)
        self.step = step_of(model, self.optimizer, self.base, modules)
        self.norm: float | None = None
        self._step_pending = False
        setattr(model, _MARKER, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Check the Trainer, and restore the method's state if training resumes from a checkpoint."""
        self._check_trainer(args, trainer["model"], trainer["optimizer"])
        self.step.total, self.step.index = state.max_steps, state.global_step - 1
        if state.global_step:
            tree = read_checkpoint_file(args, state, FILE, self.optimizer)
            frozen = set(tree["frozen"])
            for name, parameter in self.step.model.named_parameters():
                parameter.requires_grad_(name not in frozen)
            self.method.restore(tree["method"])
        _share_generators(self.method)

    def _check_trainer(self, args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        name = type(self.method).__name__
        # The Trainer clips before on_pre_optimizer_step, in which the method may still edit the gradients.
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm must be 0 with {name}, got {args.max_grad_norm}: pass clip to trainer_kwargs instead"
            )
        # Loss scaling skips the optimizer steps whose gradients overflow, which the hooks cannot see.
        if args.fp16:
            raise ValueError(f"fp16 must be False with {name}, got True: use bf16=True instead")
        reject_sharded(model, optimizer)
        if model is not self.step.model or unwrap_optimizer(optimizer) is not self.optimizer:
            raise ValueError(
                "cannot train a model or optimizer that is not from the trainer_kwargs call of this callback; pass the "
                "model and all results of one call, and no model_init"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Call ``before_step``."""
        self.step.index = state.global_step
        self.method.before_step(self.step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Call ``after_backward`` on the gradients of the whole batch, then clip them."""
        self.method.after_backward(self.step)
        self.norm = clip_gradients(self.optimizer, self.settings.clip)
        if reason := nonfinite_reason(self.step, 0.0, self.norm, self.optimizer.param_groups[0]["lr"]):
            raise FloatingPointError(reason)
        self._step_pending = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Call ``after_step``, once per step: a recorder may call this before the Trainer does."""
        if self._step_pending:
            self._step_pending = False
            self.method.after_step(self.step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any) -> None:
        """Write the method's state into the Trainer's checkpoint."""
        frozen = [name for name, p in self.step.model.named_parameters() if not p.requires_grad]
        write_checkpoint_file(args, state, FILE, self.optimizer, {"method": self.method.state(), "frozen": frozen})


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, base: Base, modules: pd.DataFrame) -> Step:
    """Return the Step of a Trainer, which gives no access to batches, their loss or held-out text."""

    def unavailable(source: str) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise ValueError(f"cannot access {source} under a Trainer; train with ls.train")

        return fail

    sources = (unavailable("the loss of a batch"), unavailable("the search split"), unavailable("held-out text"))
    return Step(-1, 0, model, optimizer, base, modules, *sources, shows_text=False)


def attached_callback(model: nn.Module) -> MethodCallback | None:
    """Return the method callback of a model, or None without one."""
    return getattr(model, _MARKER, None)


def _only_phase(method: Method, base: Base) -> Method:
    """Return the method of the only phase; raise a ValueError if it needs several phases or a search split."""
    name = type(method).__name__
    if isinstance(method, NeFT) and method.neurons is None:
        raise ValueError(f"neurons of {name} must be set under a Trainer, got None: pass neurons=, or {_USE_TRAIN}")
    phase = next(method.phases(base))
    if phase.name or method.search_share:
        needs = "several phases" if phase.name else "a search split"
        raise ValueError(f"cannot train {name} under a Trainer: it needs {needs}; {_USE_TRAIN}")
    return phase.method


def reject_sharded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if the weights are sharded, so that no process has all of them."""
    reason = "no process has all its weights; use DDP or a single process"
    for name, parameter in model.named_parameters():
        # ZeRO-3 and the first version of FSDP leave ordinary parameters that only an attribute identifies.
        if isinstance(parameter, DTensor) or any(hasattr(parameter, key) for key in ("ds_id", "_fsdp_flattened")):
            raise ValueError(f"cannot use sharded {name} (FSDP, tensor parallelism or ZeRO-3): {reason}")
    known = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(f"cannot use an optimizer of sharded weights (FSDP or DeepSpeed): {reason}")


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper, or the optimizer itself without one."""
    return getattr(optimizer, "optimizer", optimizer)


def _share_generators(method: Method) -> None:
    """Copy the first process's generators to all processes, since each process seeded its own."""
    if distributed.is_available() and distributed.is_initialized():
        generators = [{key: value for key, value in method.state().items() if isinstance(value, np.random.Generator)}]
        distributed.broadcast_object_list(generators, src=0)
        method.restore(generators[0])


def write_checkpoint_file(
    args: TrainingArguments, state: TrainerState, name: str, optimizer: torch.optim.Optimizer, tree: dict[str, Any]
) -> None:
    """Write a state into the Trainer's checkpoint of this step, in the first process only."""
    if state.is_world_process_zero:
        save_tree(_checkpoint(args, state) / name, tree | {"weights": fingerprint(optimizer)})


def read_checkpoint_file(
    args: TrainingArguments, state: TrainerState, name: str, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the state that ``write_checkpoint_file`` wrote into the checkpoint from which the Trainer resumes.

    Raises
    ------
    ValueError
        The file is missing, or belongs to other weights than those the Trainer loaded.
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
