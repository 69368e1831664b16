"""Adapters: updates of a module's weight, and functions to attach, detach, fold (merge) and resize them.

``attach`` keeps the adapted module (the host) and changes its class to a subclass that overrides only ``forward``.
Parameter names of the base model, ``isinstance``, deepcopy, pickle and torch.compile work as before. The adapter's
parameters are called ``<module>.delta.<factor>``. A part of a fused weight, such as ``c_attn[q]``, becomes a module
next to the fused one; see ``weight_parts``.
"""

from __future__ import annotations

import difflib
import warnings
import weakref
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorascope.adapters.adapted_module import ADAPTED, BASE_CLASS, Adapted, register_adapted
from lorascope.adapters.host_weights import host_weight, orient_weight, packed_bits, to_array
from lorascope.adapters.peft_layers import (
    PeftDelta,
    is_peft_layer,
    is_readable,
    name_without_peft,
    peft_layers,
    peft_update,
    retained_components,
    unwrap_peft_layer,
    unwrap_peft_model,
)
from lorascope.adapters.weight_parts import WeightPart, attach_part, find_host, is_split, join_parts, stored_weight
from lorascope.array_types import Float, Int
from lorascope.schema.fused_parts import split_part_name
from lorascope.updates import Dense, Update

# Attribute of an optimizer in the loop of ``ls.train``, which sums gradients over processes without DDP's buckets.
SUMMED = "_lorascope_summed"


class Delta(nn.Module):
    """Delta: update of one module, with the shape (out, in) regardless of the layout that the host stores.

    An embedding is the linear map of a one-hot vector: in is the vocabulary size, out the width, and ``forward`` takes
    ids. A subclass implements ``weight``; it can override ``forward``, ``affine`` or ``update`` with faster versions.
    """

    linear: ClassVar[bool] = True
    """True if ``forward(x) == F.linear(x, weight())``, so that the update can be folded into the weight."""
    resized: ClassVar[bool] = False
    """True if training changes the number of components, so that factors have no fixed initial values."""
    # Weak, because the host refers to its Delta.
    _host: weakref.ref[Any] | None = None

    @property
    def host(self) -> Any:
        """The adapted module, whose weight W_0 an update may depend on.

        Raises
        ------
        RuntimeError
            The Delta is not attached.
        """
        if self._host is not None and (host := self._host()) is not None:
            return host
        raise RuntimeError(f"{type(self).__name__} needs its host: attach it first")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the host, which a copy gets from its own host."""
        return {key: value for key, value in super().__getstate__().items() if key != "_host"}

    def weight(self) -> Float[Tensor, "out in"]:
        """Return the update as a matrix."""
        raise NotImplementedError(f"{type(self).__name__} does not implement weight")

    def forward(self, x: Tensor) -> Float[Tensor, "*batch out"]:
        """Compute the update's contribution to the host's output.

        Parameters
        ----------
        x : Tensor
            Shape (..., in), or token ids of shape (...) on an embedding.
        """
        if x.is_floating_point():
            return F.linear(x, self.weight().to(x.dtype))
        return F.embedding(x, self.weight().T)

    def affine(
        self, x: Float[Tensor, "*batch in"], W: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """Compute the output of an adapted linear host: ``F.linear(x, W, b)`` plus the update's contribution."""
        output = F.linear(x, W, b)
        return (output + self(x)).to(output.dtype)

    def factors(self) -> dict[str, Tensor]:
        """Return the tensors to store in snapshots, by name.

        For an update ``scale * B @ diag(diagonal) @ A`` the names are ``B``, ``diagonal`` and ``A``, without
        ``diagonal`` if it is all ones. The update can be rebuilt from these.
        """
        return {name: factor for name, factor in self._parameters.items() if factor is not None}

    @property
    def rank(self) -> int:
        """Number of components in use."""
        return self.update().rank

    def update(self) -> Update:
        """Return a copy of the update in numpy."""
        return Dense(to_array(self.weight()))


class AdaptedLinear(Adapted, nn.Linear):
    """``nn.Linear`` with a Delta."""

    def forward(self, x: Tensor) -> Tensor:
        return self.delta.affine(x, self.weight, self.bias)


class AdaptedConv1D(Adapted, Conv1D):
    """GPT-2's ``Conv1D``, which stores (in, out), with a Delta."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.delta.affine(x, self.weight.T, self.bias)


class AdaptedEmbedding(Adapted, nn.Embedding):
    """``nn.Embedding`` with a Delta."""

    def forward(self, ids: Tensor) -> Tensor:
        output = super().forward(ids)
        return (output + self.delta(ids)).to(output.dtype)


class AdaptedPart(Adapted, WeightPart):
    """Part of a fused weight, with a Delta."""

    def forward(self, x: Tensor) -> Tensor:
        return self.delta.affine(x, self.weight, self.bias)


register_adapted(WeightPart, AdaptedPart)
register_adapted(nn.Linear, AdaptedLinear)
register_adapted(Conv1D, AdaptedConv1D)
register_adapted(nn.Embedding, AdaptedEmbedding)


def attach(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Attach Deltas to modules by dotted name; on an error, none is attached.

    If several modules share a weight, only the named module is adapted.

    Parameters
    ----------
    model : Module
    deltas : mapping module name -> Delta
        Updates with the shapes (out, in) of the modules, or of parts of fused weights.

    Raises
    ------
    ValueError
        A name is not a module, the module already has a Delta, or both a fused weight and a part of it are named.
    TypeError
        The class of a module is not exactly nn.Linear, nn.Embedding, GPT-2's Conv1D, or Linear4bit or Linear8bitLt of
        bitsandbytes (such as a subclass), or its ``forward`` was replaced.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name in deltas:
        split_name = split_part_name(name)
        if split_name is not None and split_name[0] in modules:
            modules[name] = _find_part(model, name, split_name[0], deltas)
        if name not in modules:
            raise ValueError(f"unknown module {name!r} of {type(model).__name__}{_suggest_modules(name, modules)}")
        if type(modules[name]) in BASE_CLASS:
            kind = type(modules[name].delta).__name__
            raise ValueError(f"cannot attach to {name!r}: it already has a {kind}. Call detach first")
        if is_split(modules[name]):
            raise ValueError(f"cannot attach to {name!r}: parts of it have adapters. Call detach first")
        if packed_bits(modules[name]):
            import lorascope.adapters.quantized_layers  # noqa: F401  # registers its classes
        # Only exact classes, because a subclass may compute something else.
        if type(modules[name]) not in ADAPTED:
            kind = f"{type(modules[name]).__module__}.{type(modules[name]).__name__}"
            raise TypeError(f"class of {name!r} must be nn.Linear, nn.Embedding or GPT-2's Conv1D, got {kind}")
        if "forward" in vars(modules[name]):
            raise TypeError(f"cannot attach to {name!r}: its forward was replaced, for example by a device_map hook")
    for name, delta in deltas.items():
        host = modules[name]
        if isinstance(host, WeightPart):
            host = attach_part(model, name)
        host.__class__ = ADAPTED[type(host)]
        host.delta = delta.to(host.weight.device)
        delta._host = weakref.ref(host)


def _find_part(model: nn.Module, name: str, fused: str, names: Container[str]) -> Any:
    """Return the part of a fused weight with this name, if the fused module itself is not adapted."""
    if fused in names:
        raise ValueError(f"cannot adapt both {fused!r} and its part {name!r}: choose one of them")
    weight_part = find_host(model, name)
    if "forward" in vars(weight_part.fused):
        raise TypeError(f"cannot attach to {name!r}: the forward of {fused!r} was replaced")
    return weight_part


def _suggest_modules(name: str, modules: Mapping[str, nn.Module]) -> str:
    hosts = [host for host, module in modules.items() if type(module) in ADAPTED]
    close = difflib.get_close_matches(name, hosts, n=3, cutoff=0.5) or [host for host in hosts if name in host][:3]
    if not close:
        return ""
    return f"; did you mean {', '.join(map(repr, close))}?"


def base_output(host: Any, x: Tensor) -> Tensor:
    """Return what an adapted module would return without its update."""
    return BASE_CLASS[type(host)].forward(host, x)


def attached_deltas(model: nn.Module) -> dict[str, Delta]:
    """Return the Delta of every adapted module by name, in model order."""
    return {name: host.delta for name, host in _hosts(model).items()}


def adapters(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, Delta | PeftDelta]:
    """Return the adapters from lorascope or PEFT, by module name without PEFT; see also ``unreadable_adapters``.

    ``names`` are the PEFT adapters to read, by default the active ones.
    """
    deltas: dict[str, Delta | PeftDelta] = dict(attached_deltas(model))
    retained = retained_components(model)
    for name, layer, adapter_names in peft_layers(model, names):
        if is_readable(layer, adapter_names):
            deltas[name] = PeftDelta(layer, adapter_names, retained.get(name))
    return deltas


def frozen_parameters(adapters: Mapping[str, Delta | PeftDelta]) -> dict[str, list[str]]:
    """Return the names of the parameters of adapters that have no ``requires_grad``, by module."""
    frozen: dict[str, list[str]] = {}
    for module, adapter in adapters.items():
        for name, parameter in adapter.named_parameters():
            if not parameter.requires_grad:
                frozen.setdefault(module, []).append(name)
    return frozen


def effective_weight(model: nn.Module, module: str) -> Float[Tensor, "out in"]:
    """Return a module's weight plus the update of its Delta; an input-dependent one is taken at mean gates."""
    host: Any = model.get_submodule(module)
    weight = host_weight(host).detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))  # 16 bits would round small updates away
    if is_split(host):
        wide = wide.clone()
        for weight_part in host.weight_parts:
            if isinstance(weight_part, AdaptedPart):
                weight_part.add_to(wide, torch.from_numpy(weight_part.delta.update().dense()).to(wide))
        return wide
    delta = attached_deltas(model).get(module)
    if delta is None:
        return weight
    return wide + torch.from_numpy(delta.update().dense()).to(wide)


def _hosts(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module) in BASE_CLASS}


def detach(model: nn.Module, join: bool = True) -> dict[str, Delta]:
    """Remove all Deltas and return them; the model is then as before ``attach``.

    Without ``join``, parts of fused weights that had one remain modules of the model, so that they can be patched.
    """
    detached = attached_deltas(model)
    for host in _hosts(model).values():
        host.delta._host = None
        del host.delta
        host.__class__ = BASE_CLASS[type(host)]
    if join:
        join_parts(model)
    return detached


def fold(model: nn.Module, untie: bool = True) -> None:
    """Merge every Delta into its host's weight in place, and remove the Delta.

    Parameters
    ----------
    model : Module
    untie : bool
        Untie shared weights if an adapted one is among them, so that other modules keep the old values. Each module
        gets its own copy, ``config.tie_word_embeddings`` becomes False, and a warning is issued.

    Raises
    ------
    ValueError
        A Delta depends on its input, so that it has no single weight, a weight is shared and ``untie`` is False, or a
        weight is quantized.
    """
    hosts = _hosts(model)
    for name, host in hosts.items():
        if not host.delta.linear:
            raise ValueError(f"cannot fold {name!r}: its {type(host.delta).__name__} depends on the input")
        if bits := packed_bits(host):
            raise ValueError(f"cannot fold into {bits}-bit weights: load the base in bfloat16")
    uses: Counter[nn.Parameter] = Counter()
    for module in model.modules():
        uses.update(module.parameters(recurse=False))
    shared = [name for name, host in hosts.items() if uses[stored_weight(host)] > 1]
    if shared and not untie:
        raise ValueError(f"cannot fold {shared[0]!r}: another module shares its weight. Pass untie=True")
    if shared:
        _untie(model)
        warnings.warn(f"untied {', '.join(map(repr, shared))}: each module now has its own weight", stacklevel=2)
    with torch.no_grad():
        for host in hosts.values():
            if isinstance(host, WeightPart):
                host.add_to(host_weight(host.fused), host.delta.weight())
            else:
                host_weight(host).add_(host.delta.weight())
    detach(model)


def _untie(model: nn.Module) -> None:
    """Copy shared weights; a module without a Delta keeps the original, which an optimizer may refer to."""
    visited: set[int] = set()
    module: Any
    for module in sorted(model.modules(), key=lambda module: type(module) in BASE_CLASS):
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in visited:
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
            visited.add(id(weight))
        if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            module.config.tie_word_embeddings = False


def resize(
    param: nn.Parameter,
    optimizer: torch.optim.Optimizer,
    keep: Int[Tensor, "kept"] | Sequence[int],
    new: Float[Tensor, "..."] | None,
    dim: int,
) -> None:
    """Resize a parameter of a Delta along one dimension in place, with its gradient and optimizer state.

    The parameter remains the same object, so parameter groups and schedulers stay valid. Call this only in
    ``after_step``: an autograd graph that still exists requires the old shape.

    Parameters
    ----------
    param : Parameter
    optimizer : Optimizer
        Its state tensors with the shape of ``param`` are resized in the same way, with zeros as new values.
    keep : (kept,)
        Indices along ``dim`` to retain, in their new order.
    new : Tensor or None
        Values to append along ``dim``; None appends nothing.
    dim : int
        Dimension to resize.

    Raises
    ------
    RuntimeError
        DDP may have gradient buckets with the old shape: training is distributed, and not in the loop of ``ls.train``.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed and not hasattr(optimizer, SUMMED):
        raise RuntimeError("cannot resize a parameter in a distributed run: train in one process")
    old = param.shape
    indices = torch.as_tensor(keep, dtype=torch.long, device=param.device)
    if new is None:
        new = param.detach().narrow(dim, 0, 0)

    # States of the optimizer may have another dtype or device than the parameter.
    def cut(tensor: Tensor, tail: Tensor) -> Tensor:
        return torch.cat([tensor.index_select(dim, indices.to(tensor.device)), tail.to(tensor)], dim)

    zeros = torch.zeros_like(new)
    gradient = param.grad
    param.grad = None
    param.data = cut(param.data, new.detach())
    if gradient is not None:
        param.grad = cut(gradient, zeros)
    state = optimizer.state.get(param, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old:
            state[key] = cut(value, zeros)


def deltas(model: nn.Module, reference: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Update]]:
    """Yield the update of every module: from a Delta, a PEFT layer, or training of the weight itself.

    PEFT adapters whose update is not a matrix, such as those of norms and of experts in one tensor, are skipped, as
    ``TrainerRecorder`` does.

    Parameters
    ----------
    model : Module
        Any model; for a PEFT model, modules have the names of its base model.
    reference : mapping parameter name -> Tensor, optional
        Base weights W_0 of weights that may have been trained; weights without an entry count as unchanged. A weight
        with several names is one update, under its first name.

    Yields
    ------
    (str, Update)
        Module name, and a copy of the update that later training does not change.
    """
    yielded: set[int] = set()
    for path, module in unwrap_peft_model(model).named_modules():
        name = name_without_peft(path)
        if is_peft_layer(module):
            update = peft_update(module)
        else:
            host = unwrap_peft_layer(module)
            before = (reference or {}).get(f"{name}.weight".lstrip("."))
            if before is not None and id(host.weight) in yielded:  # under its first name
                before = None
            elif before is not None:
                yielded.add(id(host.weight))
            update = _total_update(host, before)
        if update is not None:
            yield name, update


def _total_update(module: Any, before: Tensor | None) -> Update | None:
    """Return the sum of the Delta's update and the change of the weight itself, or None if there is neither."""
    delta = None
    if type(module) in BASE_CLASS:
        delta = module.delta.update()
    if before is None or before.ndim < 2:
        return delta
    # If the weight itself has not changed, a low-rank update remains low-rank.
    if delta is not None and torch.equal(before.to(module.weight), module.weight):
        return delta
    after = to_array(host_weight(module).double())
    change = Dense(after - to_array(orient_weight(module, before)))
    if delta is None:
        return change
    return Dense(change.matrix + delta.dense())
