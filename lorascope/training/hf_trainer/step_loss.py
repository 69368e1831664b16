"""Loss of a step under a Trainer, as its ``training_step`` returns it.

The Trainer passes callbacks only the loss of its logs, in which ``logging_nan_inf_filter`` replaces NaN and infinity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakMethod

from torch import Tensor, distributed
from transformers import Trainer

_LOSSES = "_lorascope_losses"  # attribute of the observed training_step


def running_trainer() -> Trainer:
    """Return the Trainer that calls the current callback.

    A Trainer gives its callbacks no reference to itself, so look for it among the callers.
    """
    # Not the frame of this call, whose dictionary of variables would contain the frame itself: a cycle.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return trainer
        frame = frame.f_back
    raise AssertionError("only a Trainer calls callbacks")


def observe_losses(trainer: Any) -> list[Tensor]:
    """Return the list to which ``training_step`` of a Trainer will add the loss of each micro-batch.

    The caller clears it before each step. All callers share it, and later trainings of the Trainer use it again.
    """
    training_step = trainer.training_step
    if hasattr(training_step, _LOSSES):
        return getattr(training_step, _LOSSES)
    losses: list[Tensor] = []
    # A strong reference would be a cycle, which keeps the Trainer, its model and its data loaders after their last use.
    is_method = getattr(training_step, "__self__", None) is trainer
    reference: Callable[[], Any] = WeakMethod(training_step) if is_method else lambda: training_step

    def observed(*args: Any, **kwargs: Any) -> Tensor:
        loss = reference()(*args, **kwargs)
        losses.append(loss)
        return loss

    setattr(observed, _LOSSES, losses)
    trainer.training_step = observed
    return losses


def step_loss(losses: list[Tensor]) -> float | None:
    """Return the loss of a step, the mean over all processes, of which each must call this; None without losses.

    The Trainer has divided the loss of each micro-batch by their number.
    """
    if not losses:
        return None
    total = sum(losses[1:], losses[0].clone())
    if not (distributed.is_available() and distributed.is_initialized()):
        return float(total)
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()
