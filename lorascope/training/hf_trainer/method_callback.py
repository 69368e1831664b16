"""A method under transformers' Trainer: its hooks are called from the Trainer's events, in the order of the loop here.

=========================  ===========================================================
event                      what is done
=========================  ===========================================================
``on_train_begin``         what the Trainer is set to is checked; on a resume the state is put back
``on_step_begin``          ``before_step``, before the first part of an accumulated batch
``on_pre_optimizer_step``  ``after_backward`` on the whole batch's gradients, then clipping
``on_optimizer_step``      ``after_step``, gradients still there
``on_save``                what the Trainer's checkpoint lacks is put beside it
=========================  ===========================================================

Under DDP every process calls the hooks, on gradients that are the same for all; one writes.
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
from lorascope.training.base_weights import Base, refuse_adapted
from lorascope.training.session import clip_gradients, nonfinite_reason
from lorascope.training.settings import Settings
from lorascope.training.state import fingerprint, load_tree, save_tree

FILE = "lorascope-method.safetensors"
_MARK = "_lorascope_driver"
_ELSEWHERE = "train with ls.train, then export"


class MethodCallback(TrainerCallback):
    """Drives a method that it attaches to a model.

    Parameters
    ----------
    method : Method
    model : Module
        Freshly loaded, not yet given to a Trainer.
    settings : Settings
        Rates and clipping.
    """

    def __init__(self, method: Method, model: nn.Module, settings: Settings) -> None:
        refuse_adapted(model)
        self.base = Base(model)
        self.method, self.settings = _only_phase(method, self.base), settings
        self.w0_hash = weights_hash(model)
        modules = module_table.describe(model)
        self.method.attach(model)
        self.optimizer = self.method.optimizer(model, settings.lr, settings.head_lr, settings.weight_decay)
        self.base.capture(self.optimizer)
        self.step = step_of(model, self.optimizer, self.base, modules)
        self.norm: float | None = None
        self._due = False
        setattr(model, _MARK, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Check, and go on where a checkpoint ended."""
        self._refuse(args, trainer["model"], trainer["optimizer"])
        self.step.total, self.step.index = state.max_steps, state.global_step - 1
        if state.global_step:
            tree = read_checkpoint_file(args, state, FILE, self.optimizer)
            frozen = set(tree["frozen"])
            for name, parameter in self.step.model.named_parameters():
                parameter.requires_grad_(name not in frozen)
            self.method.restore(tree["method"])
        _share_generators(self.method)

    def _refuse(self, args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        name, s = type(self.method).__name__, self.settings
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} clips before {name} has edited the gradients: set it to 0 in "
                f"TrainingArguments; rate and clip are {name}'s own, by trainer_kwargs(lr={s.lr:g}, clip={s.clip})"
            )
        if args.fp16:
            raise ValueError(f"fp16=True leaves out steps that overflow, unseen by {name}: set bf16=True, or neither")
        refuse_sharded(model, optimizer)
        if model is not self.step.model or unwrap_optimizer(optimizer) is not self.optimizer:
            raise ValueError(
                "the Trainer trains another model, or by another optimizer, than trainer_kwargs made ready: give it "
                "this model, optimizers and callbacks of one call, and no model_init"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Before the batch."""
        self.step.index = state.global_step
        self.method.before_step(self.step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Gradients of the whole batch are there."""
        self.method.after_backward(self.step)
        self.norm = clip_gradients(self.optimizer, self.settings.clip)
        if reason := nonfinite_reason(self.step, 0.0, self.norm, self.optimizer.param_groups[0]["lr"]):
            raise FloatingPointError(reason)
        self._due = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Weights have moved; whoever records the step may call this first, the second call does nothing."""
        if self._due:
            self._due = False
            self.method.after_step(self.step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any) -> None:
        """Put the method's state beside the Trainer's checkpoint."""
        frozen = [name for name, p in self.step.model.named_parameters() if not p.requires_grad]
        write_checkpoint_file(args, state, FILE, self.optimizer, {"method": self.method.state(), "frozen": frozen})


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, base: Base, modules: pd.DataFrame) -> Step:
    """What can be seen of a Trainer's steps: neither batches, nor their loss, nor any text."""

    def hidden(what: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> Any:
            raise ValueError(f"{what} of its own is not to be had under a Trainer: train with ls.train")

        return refuse

    sources = (hidden("a loss"), hidden("a search split"), hidden("held-out text"))
    return Step(-1, 0, model, optimizer, base, modules, *sources, shows_text=False)


def driver_of(model: nn.Module) -> MethodCallback | None:
    """What drives a method on this model, if anything does."""
    return getattr(model, _MARK, None)


def _only_phase(method: Method, base: Base) -> Method:
    """The method as its one phase has it; refused where there are more, or where a Trainer has not what it needs."""
    name = type(method).__name__
    if isinstance(method, NeFT) and method.neurons is None:
        raise ValueError(
            f"{name} without neurons chooses them by a training of its own: give neurons=, or {_ELSEWHERE}"
        )
    phase = next(method.phases(base))
    if phase.name or method.search_share:
        what = "several phases" if phase.name else "rows of its own to score on"
        raise ValueError(f"{name} needs {what}, which a Trainer does not give: {_ELSEWHERE}")
    return phase.method


def refuse_sharded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError where no process holds the whole weights."""
    mend = "no process has the whole of it to look at; train by DDP, or in one process"
    for name, parameter in model.named_parameters():
        # FSDP's first version leaves parameters that look like any other, but for a mark.
        if isinstance(parameter, DTensor) or any(hasattr(parameter, mark) for mark in ("ds_id", "_fsdp_flattened")):
            raise ValueError(f"{name} is sharded (FSDP, tensor parallelism or ZeRO-3): {mend}")
    known = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(f"the optimizer holds pieces of the weights in place of them (FSDP or DeepSpeed): {mend}")


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _share_generators(method: Method) -> None:
    """Give all processes the first one's generators: each was seeded by its own process."""
    if distributed.is_available() and distributed.is_initialized():
        drawn = [{key: value for key, value in method.state().items() if isinstance(value, np.random.Generator)}]
        distributed.broadcast_object_list(drawn, src=0)
        method.restore(drawn[0])


def write_checkpoint_file(
    args: TrainingArguments, state: TrainerState, name: str, optimizer: torch.optim.Optimizer, tree: dict[str, Any]
) -> None:
    """Write a state into the Trainer's checkpoint of this step, in one process."""
    if state.is_world_process_zero:
        save_tree(_checkpoint(args, state) / name, tree | {"weights": fingerprint(optimizer)})


def read_checkpoint_file(
    args: TrainingArguments, state: TrainerState, name: str, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state that ``write_checkpoint_file`` put into the checkpoint from which the Trainer goes on.

    Raises
    ------
    ValueError
        It is not there, or belongs to other weights than the Trainer has put back.
    """
    file = _checkpoint(args, state) / name
    if not file.exists():
        raise ValueError(f"the Trainer goes on at step {state.global_step}, but there is no {file}: resume in the "
                         "output_dir where it began, with the same callbacks")  # fmt: skip
    tree = load_tree(file)
    if tree["weights"] != fingerprint(optimizer):
        raise ValueError(f"{file} belongs to other weights than the Trainer has put back: resume from its own folder")
    return tree


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
