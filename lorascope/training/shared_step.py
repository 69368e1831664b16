"""What happens alike at a step, whether the loop here trains or somebody else's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lorascope.methods.base import Step
from lorascope.observe.base import Observer
from lorascope.schema.records import Item, Record


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What an optimizer may change, and what clipping covers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None) -> float | None:
    """Clip all trained gradients together; gives their norm before, or None where nothing is clipped."""
    return None if limit is None else float(torch.nn.utils.clip_grad_norm_(trained_parameters(optimizer), limit))


def not_finite(step: Step, loss: float, norm: float | None, rate: float) -> str | None:
    """What is wrong with a step's loss or gradient norm, None where both are numbers."""
    if math.isfinite(loss) and (norm is None or math.isfinite(norm)):
        return None
    what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient norm became {norm}"
    return f"{what} at step {step.index + 1} of {step.total} (rate {rate:.3g}): lower lr, or clip"


def looked_at(step: Step, told: Iterable[Item], observers: Sequence[Observer]) -> list[Item]:
    """What was told of a step and what its observers find, each thing once.

    Of what both know, such as a rank at the step that changes it, the method's word is enough.
    """
    items = list(told)
    known = {(item.quantity, item.module) for item in items if isinstance(item, Record)}
    for observer in observers:
        items.extend(
            item for item in observer(step) if not isinstance(item, Record) or (item.quantity, item.module) not in known
        )
    return items
