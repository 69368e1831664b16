"""Torch optimizers of the methods."""

from collections.abc import Callable, Iterator
from typing import Any

import torch


def closure_loss(closure: Callable[[], Any] | None) -> Any:
    """Evaluate the closure of a torch optimizer's step with gradients enabled; return None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def parameters_with_gradient(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield every parameter of an optimizer that has a gradient, with its group."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter
