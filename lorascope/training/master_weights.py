"""Copies in float32 of the 16-bit weights that an optimizer trains, so that small steps are not rounded away.

During a step the optimizer sees the copies, and gradients in float32; afterwards the weights are the rounded copies. A
copy is an entry of the optimizer's state, so that checkpoints contain it, and a weight whose state a method drops, such
as a block that LISA freezes, has none. It is created in the first step of the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorascope.methods.method import trained_parameters
from lorascope.methods.precision import wide_dtype

MASTER = "master"
"""Key of the copy in the optimizer's state of a parameter."""


class _Narrow(NamedTuple):
    """A parameter's weights and gradient in 16 bits, while the optimizer sees those in float32."""

    parameter: nn.Parameter
    weight: Tensor
    gradient: Tensor


class MasterWeights:
    """Hooks that let an optimizer step on float32 copies of its 16-bit parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._narrow: list[_Narrow] = []
        self._loaded: dict[str, Any] = {}
        optimizer.register_step_pre_hook(self._widen)
        optimizer.register_step_post_hook(self._round)
        optimizer.register_load_state_dict_pre_hook(self._note_loaded)
        optimizer.register_load_state_dict_post_hook(self._restore_loaded)

    def _widen(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Replace 16-bit parameters that have a gradient by their copies."""
        for parameter in trained_parameters(optimizer):
            gradient, dtype = parameter.grad, wide_dtype(parameter)
            if gradient is None or parameter.dtype == dtype:
                continue
            # Not optimizer.state[parameter], which would add an entry: optimizers initialize an empty state.
            master = optimizer.state.get(parameter, {}).get(MASTER)
            if master is None:
                master = parameter.detach().to(dtype)
            self._narrow.append(_Narrow(parameter, parameter.data, gradient))
            # Without a gradient, since both must have one dtype.
            parameter.grad = None
            parameter.data = master
            parameter.grad = gradient.to(dtype)

    @torch.no_grad()
    def _round(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Round the copies to the parameters, and add them to the state."""
        for parameter, weight, gradient in self._narrow:
            optimizer.state[parameter][MASTER] = parameter.data
            # In place, so that other names of the weight's memory stay valid.
            weight.copy_(parameter.data)
            parameter.grad = None
            parameter.data = weight
            parameter.grad = gradient
        self._narrow.clear()

    def _note_loaded(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _restore_loaded(self, optimizer: torch.optim.Optimizer) -> None:
        """Load wide states again: torch casts all states to the dtype of their parameter."""
        saved_ids = []
        for group in self._loaded["param_groups"]:
            saved_ids += group["params"]
        for saved_id, parameter in zip(saved_ids, trained_parameters(optimizer), strict=True):
            for key, value in self._loaded["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor) and value.dtype == wide_dtype(parameter) != parameter.dtype:
                    optimizer.state[parameter][key] = value.to(optimizer.state[parameter][key].device, copy=True)
        self._loaded = {}


def train_in_float32(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer keep float32 copies of its 16-bit parameters; nothing changes if it has none."""
    if any(parameter.dtype != wide_dtype(parameter) for parameter in trained_parameters(optimizer)):
        MasterWeights(optimizer)
