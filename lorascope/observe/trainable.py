"""Trained tensors of a model, and sums over tensors that are computed on their device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lorascope.adapters.delta import adapters
from lorascope.adapters.host_weights import orient_weight, to_host
from lorascope.adapters.peft_layers import has_peft_layers, unwrap_peft_layer, unwrapped_parameters
from lorascope.adapters.weight_parts import WeightPart
from lorascope.array_types import Float
from lorascope.methods.method import Step, trained_parameters
from lorascope.updates import Update, change_norms
from lorascope.updates.linalg import at_least_float32, product_inner

# Elements per tile of a tensor. Another number would round the recorded norms differently.
TILE = 1 << 18
# Tiles per group, few enough for the cache and enough to occupy several threads.
TILES = 8

Label = TypeVar("Label")


class TrainedTensors:
    """Trainable tensors, which the optimizer changes at a step, by label; the same throughout a run.

    ``dense`` are parameters of the base model. The label of a weight is its module, any other label is a parameter
    name. ``parameter_of`` has the name in W_0 of each label and each adapted module, "" for a weight that is packed and
    not a parameter; ``changed`` has these names for ``dense``. ``modules`` are the labels that are module names.
    """

    def __init__(self, step: Step) -> None:
        rows = step.modules
        self.modules = set(rows["module"])
        self.blocks = list(rows["module"][rows["role"] == "block"])
        # The label of a tied weight is the module in whose row of the table it is.
        label_of = {f"{module}.weight": module for module in self.modules}
        for module, other in tied_pairs(rows):
            label_of[f"{other}.weight"] = module
        trained = trained_ids(step.optimizer, has_peft_layers(step.model))
        names: dict[int, str] = {}
        self.dense: dict[str, nn.Parameter] = {}
        self.parameter_of: dict[str, str] = {}
        for name, parameter in unwrapped_parameters(step.model).items():
            if name not in step.base:
                continue
            names[id(parameter)] = name
            if id(parameter) in trained:
                label = label_of.get(name, name)
                self.dense[label], self.parameter_of[label] = parameter, name
        self.changed = set(self.parameter_of.values())
        self.deltas = adapters(step.model, step.adapter_names)
        self.hosts: dict[str, Any] = {}
        for module in self.deltas:
            host = self.hosts[module] = unwrap_peft_layer(step.model.get_submodule(module))
            self.parameter_of[module] = names.get(id(getattr(host, "weight", None)), "")
            if isinstance(host, WeightPart):  # its weight is computed at each access, from that of the fused module
                self.parameter_of[module] = f"{module}.weight"
        self.modules |= self.deltas.keys()

    def copy_updates(self, tensors: Sequence[Tensor] = ()) -> list[Float[np.ndarray, "..."]]:
        """Copy the factors of all adapters to the host, so that ``updates`` need not, and other tensors with them."""
        factors: list[Tensor] = []
        for delta in self.deltas.values():
            factors.extend(delta.factors().values())
        return to_host([*factors, *tensors])[len(factors) :]

    def total(self, sums: Mapping[Label, Float[Tensor, "tiles"]]) -> dict[Label, float]:
        """Copy sums over tiles to the host, together with the factors of all adapters, and add them up."""
        tiles = self.copy_updates(list(sums.values()))
        return dict(zip(sums, map(math.fsum, tiles), strict=True))

    def updates(self) -> dict[str, Update]:
        """Return the update of every adapted module, without the change of its base weight."""
        return {module: delta.update() for module, delta in self.deltas.items()}

    def frozen_updates(self) -> dict[str, Update]:
        """Return the update of every adapted module whose base weight is frozen."""
        return {module: delta.update() for module, delta in self.deltas.items() if self.is_frozen(module)}

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


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether tensors contain neither NaN nor infinity; the integers of quantized weights never do."""
    # A module without components has empty factors, which have no largest magnitude.
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    # The largest magnitude, because a sum of squares may overflow.
    return bool(torch.nn.utils.get_total_norm(floating, norm_type=math.inf).isfinite())


def tied_pairs(modules: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield the module and each other name of every tied weight of a module table."""
    for module, tied in zip(modules["module"], modules["tied"], strict=True):
        for other in filter(None, tied.split(",")):
            yield module, other


def changes_since(updates: Mapping[str, Update], earlier: Mapping[str, Update]) -> dict[str, float]:
    """Compute the norm of the change of each module's update, for the modules that have an earlier one."""
    pairs = {module: (update, earlier[module]) for module, update in updates.items() if module in earlier}
    return dict(zip(pairs, change_norms(pairs.values()), strict=True))


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
    subtracted: list[Any] = []
    for other in subtrahends:
        if other is not None and other.numel() != tensor.numel():
            before, now = tuple(other.shape), tuple(tensor.shape)
            raise ValueError(f"cannot record a weight that was resized from {before} to {now}: call ls.record again")
        subtracted.append(repeat(None, len(groups)) if other is None else _tile_groups(other))
    sums_of_groups: list[list[Tensor]] = []
    for tiles, *subtracted_tiles in zip(groups, *subtracted, strict=True):
        tiles = at_least_float32(tiles)
        sums_of_groups.append([_squares(tiles, minus).sum(1) for minus in subtracted_tiles])
    return list(map(torch.cat, zip(*sums_of_groups, strict=True)))


def _squares(tiles: Float[Tensor, "tiles size"], minus: Tensor | None) -> Float[Tensor, "tiles size"]:
    if minus is None:
        return tiles.square()
    return (tiles - at_least_float32(minus)).square_()  # in place, because the difference is a new tensor


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
    # The update of HydraLoRA depends on its gates, and that of DoRA on the norms of W.
    match {name: at_least_float32(factor.detach()) for name, factor in factors.items()}:
        case {"gates": _} | {"magnitude": _}:
            return None
        case {"A": A, "B": B, "A0": A0, "B0": B0}:
            # B A - B0 A0 = (B - B0) A + B0 (A - A0), without the difference of two large products.
            A, B, A0, B0 = A.double(), B.double(), A0.double(), B0.double()
            return product_inner(weight, torch.cat([B - B0, B0], 1), torch.cat([A, A - A0]))
        case {"A": A, "B": B, "diagonal": diagonal}:
            return product_inner(weight, B * diagonal, A)
        case {"A": A, "B": B}:
            return product_inner(weight, B, A)
    return None
