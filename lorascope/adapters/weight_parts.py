"""Parts of fused weights as linear layers, such as the queries of GPT-2's ``c_attn``.

A part that is attached to its model is a module next to the fused one, under its name, such as ``attn.c_attn[q]``. The
fused module then calls its parts instead of multiplying by the whole weight.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorascope.adapters.host_weights import host_weight
from lorascope.array_types import Shaped
from lorascope.schema.fused_parts import PartRows, name_of_part, split_part_name, split_rows_by_role


class WeightPart(nn.Linear):
    """Rows of a fused weight as a linear layer, in the layout (out, in) regardless of that of the fused module.

    ``weight`` and ``bias`` are taken from the fused module at each use, as views if the rows are contiguous.
    """

    fused: Any

    def __init__(self, fused: nn.Module, rows: PartRows) -> None:
        nn.Module.__init__(self)
        # Past the registration of modules, because the fused weight would get a second name.
        vars(self)["fused"] = fused
        self.rows = rows
        self.in_features, self.out_features = host_weight(fused).shape[1], rows.row_count
        self.train(fused.training)

    @property
    def role(self) -> str:
        """Role of the part: q, k or v."""
        return self.rows.role

    def take(self, tensor: Shaped[Tensor, "fused_out ..."]) -> Shaped[Tensor, "out ..."]:
        """Return the rows of this part of a tensor with the rows of the fused weight."""
        return tensor.unflatten(0, (self.rows.groups, -1))[:, self.rows.start : self.rows.stop].flatten(0, 1)

    @torch.no_grad()
    def add_to(self, target: Shaped[Tensor, "fused_out in"], matrix: Shaped[Tensor, "out in"]) -> None:
        """Add a matrix to the rows of this part in the weight of the fused module, or in a copy of it, in place."""
        groups = target.unflatten(0, (self.rows.groups, -1))
        groups[:, self.rows.start : self.rows.stop].add_(matrix.unflatten(0, (self.rows.groups, -1)))

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return self.take(host_weight(self.fused))
        if name == "bias":
            return None if self.fused.bias is None else self.take(self.fused.bias)
        return super().__getattr__(name)


class SplitLinear(nn.Linear):
    """``nn.Linear`` that calls the parts of its weight."""

    weight_parts: list[WeightPart]

    def forward(self, x: Tensor) -> Tensor:
        return join_outputs(self.weight_parts, x)


class SplitConv1D(Conv1D):
    """GPT-2's ``Conv1D`` that calls the parts of its weight."""

    weight_parts: list[WeightPart]

    def forward(self, x: Tensor) -> Tensor:
        return join_outputs(self.weight_parts, x)


_SPLIT: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SplitLinear, Conv1D: SplitConv1D}
_UNSPLIT = dict(zip(_SPLIT.values(), _SPLIT, strict=True))


def join_outputs(weight_parts: list[WeightPart], x: Tensor) -> Tensor:
    """Return the output of a fused module from those of its parts."""
    # Called as modules, so that hooks and replaced forwards of a part have an effect.
    outputs = [weight_part(x).unflatten(-1, (weight_part.rows.groups, -1)) for weight_part in weight_parts]
    return torch.cat(outputs, -1).flatten(-2)


def is_split(module: nn.Module) -> bool:
    """Return whether a module calls the parts of its weight."""
    return type(module) in _UNSPLIT


def stored_weight(host: Any) -> nn.Parameter:
    """Return the parameter that has the weight of a host: for a part, that of the fused module."""
    return host.fused.weight if isinstance(host, WeightPart) else host.weight


def parts_of(model: nn.Module, fused: str) -> list[WeightPart]:
    """Return all parts of a fused module by its name: those that it calls, or new ones.

    Raises
    ------
    ValueError
        The rows of the parts are not known, or the class of the module is not nn.Linear or GPT-2's Conv1D.
    """
    host: Any = model.get_submodule(fused)
    if is_split(host):
        return list(host.weight_parts)
    if type(host) not in _SPLIT:
        kind = type(host).__name__
        raise ValueError(f"cannot split {fused!r} into q, k, v: it must be nn.Linear or GPT-2's Conv1D, got {kind}")
    rows = split_rows_by_role(fused, len(host_weight(host)), _nearest_config(model, fused))
    return [WeightPart(host, rows_of_role) for rows_of_role in rows]


def _nearest_config(model: nn.Module, name: str) -> Any:
    """Return the configuration of the innermost module around a name that has one with a ``model_type``."""
    config, module = None, model
    for child in ["", *name.split(".")]:
        module = module.get_submodule(child)
        module_config = getattr(module, "config", None)
        if hasattr(module_config, "model_type"):
            config = module_config
    return config


def find_host(model: nn.Module, name: str) -> Any:
    """Return a module by name, or a part of a fused weight, which need not be attached.

    Raises
    ------
    ValueError
        The fused weight has no such part.
    AttributeError
        The model has no such module.
    """
    fused_role = split_part_name(name)
    if fused_role is None:
        return model.get_submodule(name)
    fused, role = fused_role
    weight_parts = {weight_part.role: weight_part for weight_part in parts_of(model, fused)}
    if role not in weight_parts:
        raise ValueError(f"unknown part {role!r} of {fused!r}; expected one of {', '.join(weight_parts)}")
    return weight_parts[role]


def attach_part(model: nn.Module, name: str) -> WeightPart:
    """Make a part of a fused weight a module of the model, next to the fused one, and return it."""
    weight_part: WeightPart = find_host(model, name)
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    host: Any = weight_part.fused
    if leaf in parent._modules:  # it stayed after its Delta was detached
        return weight_part
    if not is_split(host):
        # The fused module calls all of its parts, also those that are not attached.
        weight_parts = parts_of(model, name.rpartition("[")[0])
        host.__class__ = _SPLIT[type(host)]
        vars(host)["weight_parts"] = weight_parts
        weight_part = next(sibling for sibling in weight_parts if sibling.role == weight_part.role)
    # In the order of the rows, right after the fused module, so that adapters are listed in the order of the model.
    children = dict(parent._modules)
    parent._modules.clear()
    for key, child in children.items():
        if isinstance(child, WeightPart) and child.fused is host:
            continue
        parent._modules[key] = child
        if child is not host:
            continue
        # Parts that were attached before keep their place.
        for sibling in weight_part.fused.weight_parts:
            sibling_leaf = name_of_part(key, sibling.role)
            if sibling is weight_part or sibling_leaf in children:
                parent._modules[sibling_leaf] = sibling
    return weight_part


def join_parts(model: nn.Module) -> None:
    """Remove all parts of fused weights from the model, whose fused modules compute as before."""
    for parent in [*model.modules()]:
        for key, child in [*parent._modules.items()]:
            if isinstance(child, WeightPart):
                del parent._modules[key]
                if is_split(child.fused):
                    del vars(child.fused)["weight_parts"]
                    child.fused.__class__ = _UNSPLIT[type(child.fused)]


def part_rows(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return the rows of every attached part in its fused weight: number of groups, first row and end in each."""
    rows = {}
    for name, module in model.named_modules():
        if isinstance(module, WeightPart):
            rows[name] = module.rows[1:]
    return rows


def add_parts(modules: pd.DataFrame, model: nn.Module) -> pd.DataFrame:
    """Insert a row for every part of a fused weight into a module table, after the row of the weight."""
    rows = []
    names = set(modules["module"])
    for row in modules.to_dict("records"):
        rows.append(row)
        if row["role"] != "qkv":
            continue
        for weight_part in parts_of(model, row["module"]):
            name = name_of_part(row["module"], weight_part.role)
            if name not in names:  # an attached part has a row already
                changes = {"module": name, "role": weight_part.role, "out_features": weight_part.out_features}
                rows.append(row | changes)
    return pd.DataFrame(rows, columns=list(modules)).astype(dict(modules.dtypes))
