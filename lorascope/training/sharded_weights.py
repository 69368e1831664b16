"""Weights sharded over processes, as by FSDP2: whole copies in the first process while it records."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from lorascope.files.printable import printable
from lorascope.methods.method import Step, trained_parameters
from lorascope.observe.factor_snapshots import factors
from lorascope.observe.observer import Observer
from lorascope.observe.weight_norms import norms

SHARDED = "no process has all its weights; use DDP or a single process"


def is_first_process() -> bool:
    """Return whether this is the first process, which writes the records and has whole copies of sharded weights."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())


def whole_number(name: str, value: float | Tensor | None) -> float | None:
    """Return a number, which may be sharded like the weights (FSDP2's gradient norm); all processes must call it.

    Raise a ValueError, which calls it ``name``, if it is not a number.
    """
    if value is None:
        return None
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        value = value.detach()  # float() warns of a tensor with a graph
    try:
        return float(value)
    except OverflowError:
        largest = f"{sys.float_info.max:.2g}"
        raise ValueError(f"{name} must be <= {largest}, got an integer of {int(value).bit_length()} bits") from None
    except (TypeError, ValueError, RuntimeError):
        text = printable(repr(value))
        raise ValueError(f"{name} must be a number or a tensor with one value, got {text}") from None


def reject_sharded_weights(model: nn.Module, gathered: bool = False, fix: str = SHARDED) -> None:
    """Raise a ValueError if a weight is sharded, so that no process has all of it.

    With ``gathered``, the sharded parameters of FSDP2 and tensor parallelism are accepted. ``fix`` ends the message.
    """
    for name, parameter in model.named_parameters():
        # ZeRO-3 and the first version of FSDP leave ordinary parameters that only an attribute identifies.
        flattened = hasattr(parameter, "ds_id") or hasattr(parameter, "_fsdp_flattened")
        if flattened or (isinstance(parameter, DTensor) and not gathered):
            if gathered:
                fix = "shard it with fully_shard (FSDP2), or use DDP or a single process"
            raise ValueError(f"cannot use sharded {printable(name)} (FSDP, tensor parallelism or ZeRO-3): {fix}")


class WholeWeights:
    """Whole copies of sharded weights, in the CPU memory of the first process.

    All processes must call ``gather`` at the same steps. ``in_place`` then puts the copies in the place of the shards.
    The copies stay the same objects, since observers keep references to them.

    Parameters
    ----------
    model : Module
        Model whose parameters are shards, or also whole ones.
    optimizer : Optimizer
        Optimizer of its parameters; the copies of all others are made once.
    observers : sequence of Observer
        Observers, which determine the steps at which ``gather`` is due.

    Raises
    ------
    ValueError
        An observer reads more than weights, such as the state of the optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, observers: Sequence[Observer]) -> None:
        self._optimizer, self._observers = optimizer, observers
        self._parameters = []
        self._shards: dict[int, DTensor] = {}
        for module in model.modules():
            # A tied weight is in several modules, and each of them needs its copy.
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if isinstance(parameter, DTensor):
                    self._parameters.append((module, name, parameter))
                    self._shards[id(parameter)] = parameter
        for observer in observers:
            if self._shards and not isinstance(observer, norms | factors):
                raise ValueError(
                    f"cannot record {type(observer).__name__} of sharded weights: only norms and factors are gathered"
                )
        self._copies: dict[int, nn.Parameter] = {}
        self.gather()

    def due(self, step: Step) -> bool:
        """Return whether an observer reads shards after this step; norms also read those before a recording."""
        if not self._shards:
            return False
        if step.last:
            return True
        finished, total = step.finished, step.total
        return any(observer.due(finished, total) or observer.due(finished + 1, total) for observer in self._observers)

    @torch.no_grad()
    def gather(self) -> None:
        """Update the copies in the first process; the other processes send their shards."""
        trained = set(map(id, trained_parameters(self._optimizer)))
        for key, shard in self._shards.items():
            if key in self._copies and key not in trained:
                continue
            full = shard.full_tensor().detach()
            if not is_first_process():
                full = full[:0]  # only the memory of one parameter at a time
            if key not in self._copies:
                self._copies[key] = nn.Parameter(torch.empty_like(full, device="cpu"), requires_grad=False)
            self._copies[key].copy_(full)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the copies in the place of the shards in the first process, in the model and in the optimizer."""
        if not self._shards or not is_first_process():
            yield
            return
        groups = [list(group["params"]) for group in self._optimizer.param_groups]
        replaced = [(module, name, module._parameters[name]) for module, name, _ in self._parameters]
        # The training may have frozen or unfrozen shards since the last time.
        for key, shard in self._shards.items():
            self._copies[key].requires_grad_(shard.requires_grad)
        try:
            for module, name, parameter in self._parameters:
                module._parameters[name] = self._copies[id(parameter)]
            for group, parameters in zip(self._optimizer.param_groups, groups, strict=True):
                group["params"] = [self._copies.get(id(parameter), parameter) for parameter in parameters]
            yield
        finally:
            for module, name, before in replaced:
                module._parameters[name] = before
            for group, parameters in zip(self._optimizer.param_groups, groups, strict=True):
                group["params"] = parameters
