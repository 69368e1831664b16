"""What trains in a model, and sums of squares over its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, attached_deltas
from lorascope.adapters.host_weights import host_kind, orient_weight, to_array
from lorascope.adapters.peft_layers import (
    PeftDelta,
    active_adapters,
    is_peft_layer,
    is_readable,
    retained_components,
    unwrap_peft_layer,
    unwrapped_parameters,
)
from lorascope.methods.base import Step
from lorascope.updates.fourier import Fourier
from lorascope.updates.low_rank import Dense, LowRank

# Elements of one tile of a pass over a tensor: small enough for the cache.
TILE = 1 << 18


@dataclass(frozen=True, eq=False)
class TrainedTensors:
    """What the optimizer changes, under the names of the table. It stays the same during a run.

    Parameters
    ----------
    dense : dict label -> Parameter
        Parameters of the base that train themselves. The label of a weight is its module, of any other its own name.
    deltas : dict module -> Delta
        Or PEFT's layer, seen as one.
    hosts : dict module -> Module
        Adapted modules.
    parameter_of : dict label -> str
        Name in W_0 of what a label, or an adapted module, stands for; "" where the weight is packed, and no parameter.
    changed : frozenset of str
        Names in W_0 of what ``dense`` holds.
    modules : frozenset of str
        Labels that are modules.
    blocks : tuple of str
    """

    dense: dict[str, nn.Parameter]
    deltas: dict[str, Delta | PeftDelta]
    hosts: dict[str, Any]
    parameter_of: dict[str, str]
    changed: frozenset[str]
    modules: frozenset[str]
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, step: Step) -> TrainedTensors:
        """Find it."""
        rows = step.modules
        uses = {f"{name}.weight": row for name, row in _weight_names(zip(rows["module"], rows["tied"], strict=True))}
        trained = {id(parameter) for group in step.optimizer.param_groups for parameter in group["params"]}
        parameters = {name: p for name, p in unwrapped_parameters(step.model).items() if name in step.base}
        names = {id(parameter): name for name, parameter in parameters.items()}
        dense = {uses.get(name, name): p for name, p in parameters.items() if id(p) in trained}
        deltas = adapters(step.model)
        hosts = {module: unwrap_peft_layer(step.model.get_submodule(module)) for module in deltas}
        parameter_of = {label: names[id(p)] for label, p in dense.items()}
        changed = frozenset(parameter_of.values())
        parameter_of |= {module: names.get(id(getattr(host, "weight", None)), "") for module, host in hosts.items()}
        modules = frozenset({*rows["module"], *deltas})
        return cls(dense, deltas, hosts, parameter_of, changed, modules, tuple(rows["module"][rows["role"] == "block"]))

    def updates(self) -> dict[str, LowRank | Dense]:
        """The update of every adapted module, without what its weight itself has learned."""
        return {module: delta.update() for module, delta in self.deltas.items()}

    def is_frozen(self, module: str) -> bool:
        """Is the weight below an adapter left as it is?"""
        return self.parameter_of[module] not in self.changed

    def add(self, module: str, weight: Tensor, update: LowRank | Dense) -> Tensor:
        """An adapted module's weight and an update together, in the layout of the weight."""
        matrix = torch.from_numpy(update.dense()).to(weight)
        return weight + orient_weight(self.hosts[module], matrix).reshape(weight.shape)


def adapters(model: nn.Module) -> dict[str, Delta | PeftDelta]:
    """What adapts a module, ours or PEFT's, by its name without PEFT; not ``unreadable_adapters``."""
    kept = retained_components(model)
    active = {name: PeftDelta(layer, kept.get(name)) for name, layer in _active_layers(model) if is_readable(layer)}
    return {**attached_deltas(model), **active}


def unreadable_adapters(model: nn.Module) -> dict[str, str]:
    """Modules whose adapters of PEFT make no update of a matrix, with their classes."""
    return {
        name: host_kind(unwrap_peft_layer(layer)) for name, layer in _active_layers(model) if not is_readable(layer)
    }


def _active_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers that do something."""
    for name, module in model.named_modules():
        if is_peft_layer(module) and active_adapters(module):
            yield name, module


def _weight_names(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Every name of a weight, with the module that it has in the table."""
    for module, tied in pairs:
        yield from ((name, module) for name in (module, *filter(None, tied.split(","))))


def squares(tensor: Float[Tensor, "..."], minus: Float[Tensor, "..."] | None = None) -> float:
    """Sum of squares of a tensor, or of its difference from another."""
    # sum() adds in a cascade: a norm or dot product would lose digits, and depend on the alignment of the memory.
    return math.fsum(float(tile.square().sum()) for tile in _tiles(tensor, minus))


def inner(weight: Float[Tensor, "out in"], update: LowRank | Dense) -> float:
    """<W, dW>, without forming a factored dW."""
    if isinstance(update, Fourier):
        return update.inner(to_array(weight))
    if isinstance(update, Dense):
        matrix = torch.from_numpy(update.matrix).to(weight.device)
        return math.fsum(float((w * dw).sum()) for w, dw in zip(_tiles(weight), _tiles(matrix), strict=True))
    A, B = (torch.from_numpy(factor).to(weight.device) for factor in (update.A, update.B))
    return float(update.scale * ((_promote_tile(weight) @ A.T).double() * B.double()).sum())


def _tiles(tensor: Tensor, minus: Tensor | None = None) -> Iterator[Float[Tensor, "tile"]]:
    if minus is None:
        for tile in tensor.reshape(-1).split(TILE):
            yield _promote_tile(tile)
    else:
        for tile, other in zip(tensor.reshape(-1).split(TILE), minus.reshape(-1).split(TILE), strict=True):
            yield _promote_tile(tile) - _promote_tile(other)


def _promote_tile(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
