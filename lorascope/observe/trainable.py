"""Trained tensors of a model, and sums over tensors that are computed on their device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, attached_deltas
from lorascope.adapters.host_weights import host_kind, orient_weight, to_host
from lorascope.adapters.peft_layers import (
    PeftDelta,
    active_adapters,
    adapters_among,
    has_peft_layers,
    is_peft_layer,
    is_readable,
    name_without_peft,
    retained_components,
    unwrap_peft_layer,
    unwrapped_parameters,
)
from lorascope.array_types import Float
from lorascope.methods.method import Step, trained_parameters
from lorascope.updates import Update
from lorascope.updates.linalg import at_least_float32, product_inner

# Elements per tile of a tensor. Another number would round the recorded norms differently.
TILE = 1 << 18
# Tiles per group, few enough for the cache and enough to occupy several threads.
TILES = 8


class TrainedTensors:
    """Trainable tensors, which the optimizer changes at a step, by label; the same throughout a run.

    ``dense`` are parameters of the base model. The label of a weight is its module, any other label is a parameter
    name. ``parameter_of`` has the name in W_0 of each label and each adapted module, "" for a weight that is packed and
    not a parameter; ``changed`` has these names for ``dense``. ``modules`` are the labels that are module names.
    """

    def __init__(self, step: Step) -> None:
        rows = step.modules
        uses = {}
        for module, tied in zip(rows["module"], rows["tied"], strict=True):
            for name in (module, *filter(None, tied.split(","))):
                uses[f"{name}.weight"] = module
        trained = trained_ids(step.optimizer, has_peft_layers(step.model))
        parameters = {name: p for name, p in unwrapped_parameters(step.model).items() if name in step.base}
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.dense = {uses.get(name, name): p for name, p in parameters.items() if id(p) in trained}
        self.deltas = adapters(step.model, step.adapter_names)
        self.hosts: dict[str, Any] = {name: unwrap_peft_layer(step.model.get_submodule(name)) for name in self.deltas}
        self.parameter_of = {label: names[id(p)] for label, p in self.dense.items()}
        self.changed = set(self.parameter_of.values())
        self.parameter_of |= {name: names.get(id(getattr(h, "weight", None)), "") for name, h in self.hosts.items()}
        self.modules = {*rows["module"], *self.deltas}
        self.blocks = list(rows["module"][rows["role"] == "block"])

    def copy_updates(self, tensors: Sequence[Tensor] = ()) -> list[Float[np.ndarray, "..."]]:
        """Copy the factors of all adapters to the host, so that ``updates`` need not, and other tensors with them."""
        factors = [factor for delta in self.deltas.values() for factor in delta.factors().values()]
        return to_host([*factors, *tensors])[len(factors) :]

    def updates(self) -> dict[str, Update]:
        """Return the update of every adapted module, without the change of its base weight."""
        return {module: delta.update() for module, delta in self.deltas.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return every trained tensor of the base model by label, including the update of its adapter."""
        tensors: dict[str, Tensor] = {label: parameter.detach() for label, parameter in self.dense.items()}
        for module, delta in self.deltas.items():
            if not self.is_frozen(module):
                tensors[module] = self.add(module, self.hosts[module].weight.detach(), delta.update())
        return tensors

    def is_frozen(self, module: str) -> bool:
        """Return whether the base weight of an adapted module is frozen."""
        return self.parameter_of[module] not in self.changed

    def add(self, module: str, weight: Tensor, update: Update) -> Tensor:
        """Return an adapted module's weight plus an update, in the layout of the weight."""
        matrix = torch.from_numpy(update.dense()).to(weight)
        return weight + orient_weight(self.hosts[module], matrix).reshape(weight.shape)


def trained_ids(optimizer: torch.optim.Optimizer, peft: bool) -> set[int]:
    """Return the ids of the trainable parameters, which an optimizer may change.

    A frozen parameter may train later, as in LISA. It never does under PEFT, where the optimizer of all parameters of a
    model also contains the base weights.
    """
    return {id(parameter) for parameter in trained_parameters(optimizer) if parameter.requires_grad or not peft}


def adapters(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, Delta | PeftDelta]:
    """Return the adapters from lorascope or PEFT, by module name without PEFT; see also ``unreadable_adapters``.

    ``names`` are the PEFT adapters to read, by default the active ones.
    """
    deltas: dict[str, Delta | PeftDelta] = dict(attached_deltas(model))
    retained = retained_components(model)
    for name, layer, adapter_names in _peft_layers(model, names):
        if is_readable(layer, adapter_names):
            deltas[name] = PeftDelta(layer, adapter_names, retained.get(name))
    return deltas


def unreadable_adapters(model: nn.Module) -> dict[str, str]:
    """Return the modules whose PEFT adapters do not make an update of a matrix, with their class names."""
    kinds = {}
    for name, layer, adapter_names in _peft_layers(model, None):
        if not is_readable(layer, adapter_names):
            kinds[name] = host_kind(unwrap_peft_layer(layer))
    return kinds


def _peft_layers(model: nn.Module, names: Sequence[str] | None) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield the PEFT layers with adapters among ``names``, by default the active ones: name, layer, its adapters."""
    for name, module in model.named_modules():
        if is_peft_layer(module):
            adapter_names = active_adapters(module) if names is None else adapters_among(module, names)
            if adapter_names:
                yield name_without_peft(name), module, adapter_names


def tile_sums(tensor: Float[Tensor, "..."], minus: Float[Tensor, "..."] | None = None) -> Float[Tensor, "tiles"]:
    """Compute sums of squares over tiles of a trainable or base tensor, or of its difference, on its device."""
    return joint_tile_sums(tensor, [minus])[0]


def joint_tile_sums(
    tensor: Float[Tensor, "..."], subtrahends: Sequence[Float[Tensor, "..."] | None]
) -> list[Float[Tensor, "tiles"]]:
    """Compute sums of squares over tiles of a trainable or base tensor minus each subtrahend; None is zero."""
    # The tensor is read from memory once for all sums. Each row is one tile, so its sum does not depend on the group.
    # sum() adds pairwise. A norm or dot product would lose digits and depend on the alignment of the memory.
    groups = _tile_groups(tensor)
    subtracted = [[None] * len(groups) if other is None else _tile_groups(other) for other in subtrahends]
    sums: list[list[Tensor]] = [[] for _ in subtrahends]
    for tiles, *subtracted_tiles in zip(groups, *subtracted, strict=True):
        tiles = at_least_float32(tiles)
        for tile_totals, minus in zip(sums, subtracted_tiles, strict=True):
            squares = tiles.square() if minus is None else (tiles - at_least_float32(minus)).square_()
            tile_totals.append(squares.sum(1))
    return list(map(torch.cat, sums))


def _tile_groups(tensor: Float[Tensor, "..."]) -> list[Float[Tensor, "tiles size"]]:
    """Return a tensor as groups of whole tiles, with the remaining entries as a separate, shorter tile."""
    flat = tensor.reshape(-1)
    full_tiles, last_tile = flat.split([flat.numel() // TILE * TILE, flat.numel() % TILE])
    groups: list[Tensor] = []
    if full_tiles.numel():
        groups.extend(full_tiles.view(-1, TILE).split(TILES))
    if last_tile.numel() or not groups:
        groups.append(last_tile.unsqueeze(0))
    return groups


def factor_inner(weight: Float[Tensor, "out in"], factors: Mapping[str, Tensor]) -> Float[Tensor, ""] | None:
    """Compute <W, dW> / scale from trainable factors on their device; None if they do not form one product."""
    match {name: at_least_float32(factor.detach()) for name, factor in factors.items()}:
        case {"gates": _} | {"magnitude": _}:
            return None
        case {"A": A, "B": B, "A0": A0, "B0": B0}:
            A, B, A0, B0 = A.double(), B.double(), A0.double(), B0.double()
            return product_inner(weight, torch.cat([B - B0, B0], 1), torch.cat([A, A - A0]))
        case {"A": A, "B": B, "diagonal": diagonal}:
            return product_inner(weight, B * diagonal, A)
        case {"A": A, "B": B}:
            return product_inner(weight, B, A)
    return None
