"""Adapters: what is added to a module's weight, how it is put there, taken away, folded in and resized.

A host keeps its identity: ``attach`` exchanges its class for one that overrides ``forward`` alone, so the base's
parameter names, ``isinstance``, deepcopy, pickle and torch.compile stay as they were. The adapter's parameters are
``<module>.delta.<factor>``.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorascope.adapters.host_weights import host_bias, host_weight, orient_weight, to_array
from lorascope.adapters.peft_layers import is_peft_layer, peft_update
from lorascope.updates.low_rank import Dense, LowRank

__all__ = [
    "Delta",
    "attach",
    "attached_deltas",
    "deltas",
    "detach",
    "fold",
    "host_bias",
    "host_weight",
    "resize",
    "to_array",
]


class Delta(nn.Module):
    """The update of one module, always seen as (out, in) whatever the host stores.

    An embedding is the linear map of a one-hot: in is the vocabulary, out the width, and ``forward`` takes ids.
    A subclass gives ``weight``, and ``forward``, ``affine`` or ``update`` where it knows a cheaper way.
    """

    linear: ClassVar[bool] = True
    """Does ``forward(x) == F.linear(x, weight())`` hold?"""

    def weight(self) -> Float[Tensor, "out in"]:
        """The update as a matrix."""
        raise NotImplementedError(f"{type(self).__name__} has no weight")

    def forward(self, x: Tensor) -> Float[Tensor, "*batch out"]:
        """What the update adds to the host's output.

        Parameters
        ----------
        x : Float[Tensor, "*batch in"], or Int[Tensor, "*batch"] on an embedding
        """
        return F.linear(x, self.weight()) if x.is_floating_point() else F.embedding(x, self.weight().T)

    def affine(
        self, x: Float[Tensor, "*batch in"], W: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """The whole map of an adapted linear host: ``F.linear(x, W, b)`` plus the update's part."""
        return F.linear(x, W, b) + self(x)

    def factors(self) -> dict[str, Tensor]:
        """The tensors worth a snapshot, by name.

        Where the update is ``scale * B @ diag(diagonal) @ A`` they have these names, ``diagonal`` left out where it is
        all ones, so that the update can be rebuilt from a snapshot.
        """
        return dict(self.named_parameters(recurse=False))

    @property
    def rank(self) -> int:
        """Number of components in use."""
        return self.update().rank

    def update(self) -> LowRank | Dense:
        """A copy of the update in numpy."""
        return Dense(to_array(self.weight()))


class AdaptedLinear(nn.Linear):
    """``nn.Linear`` with a Delta; made by ``attach``."""

    delta: Delta

    def forward(self, x: Tensor) -> Tensor:
        return self.delta.affine(x, self.weight, self.bias)


class AdaptedConv1D(Conv1D):
    """GPT-2's ``Conv1D``, which stores (in, out), with a Delta; made by ``attach``."""

    delta: Delta

    def forward(self, x: Tensor) -> Tensor:
        return self.delta.affine(x, self.weight.T, self.bias)


class AdaptedEmbedding(nn.Embedding):
    """``nn.Embedding`` with a Delta; made by ``attach``."""

    delta: Delta

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.delta(ids)


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: AdaptedLinear,
    Conv1D: AdaptedConv1D,
    nn.Embedding: AdaptedEmbedding,
}
_PLAIN = {adapted: plain for plain, adapted in _ADAPTED.items()}


def attach(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Put Deltas on modules, by dotted name; all of them or, on an error, none.

    Of a weight that several modules share, the named use alone is adapted.

    Raises
    ------
    ValueError
        A name is no module, or its module carries a Delta already.
    TypeError
        The module is of a class whose ``forward`` is not a plain linear map or lookup: quantised layers, subclasses.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name in deltas:
        if name not in modules:
            raise ValueError(f"{name!r} is no module of {type(model).__name__}{_suggest_modules(name, modules)}")
        if type(modules[name]) in _PLAIN:
            raise ValueError(f"{name!r} carries a {type(modules[name].delta).__name__} already; detach it first")
        _check_host(name, modules[name])
    for name, delta in deltas.items():
        host = modules[name]
        host.__class__ = _ADAPTED[type(host)]
        host.delta = delta.to(host.weight.device)


def _check_host(name: str, host: Any) -> None:
    takes = "a Delta takes nn.Linear, nn.Embedding or GPT-2's Conv1D themselves"
    if type(host) not in _ADAPTED:
        raise TypeError(f"{name!r} is a {type(host).__module__}.{type(host).__name__}; {takes}")
    if "forward" in vars(host):
        raise TypeError(f"{name!r} has a forward of its own, such as a device_map hook puts there; {takes}")


def _suggest_modules(name: str, modules: Mapping[str, nn.Module]) -> str:
    hosts = [known for known, module in modules.items() if type(module) in _ADAPTED]
    close = difflib.get_close_matches(name, hosts, n=3, cutoff=0.5) or [host for host in hosts if name in host][:3]
    return f"; near: {', '.join(close)}" if close else ""


def attached_deltas(model: nn.Module) -> dict[str, Delta]:
    """The Delta of every adapted module, in model order."""
    return {name: host.delta for name, host in _hosts(model).items()}


def effective_weight(model: nn.Module, module: str) -> Float[Tensor, "out in"]:
    """The weight of a module with its adapter's update, which is at mean gates where it depends on the input."""
    weight, delta = host_weight(model.get_submodule(module)).detach(), attached_deltas(model).get(module)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))  # 16 bits would round small updates away
    return weight if delta is None else wide + torch.from_numpy(delta.update().dense()).to(wide)


def _hosts(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module) in _PLAIN}


def detach(model: nn.Module) -> dict[str, Delta]:
    """Take all Deltas off and return them; the model is then as before ``attach``."""
    found = attached_deltas(model)
    for host in _hosts(model).values():
        del host.delta
        host.__class__ = _PLAIN[type(host)]
    return found


def fold(model: nn.Module, untie: bool = True) -> None:
    """Add every Delta into its host's weight, in place, and take it off.

    Where other modules use an adapted weight too, every use of a shared weight becomes a copy of its own first and
    ``config.tie_word_embeddings`` is set to False, with a warning: the other uses keep the old values.

    Raises
    ------
    ValueError
        A Delta depends on its input and has no single weight; or a weight is shared and ``untie`` is False.
    """
    hosts = _hosts(model)
    for name, host in hosts.items():
        if not host.delta.linear:
            raise ValueError(f"{name!r} cannot be folded: a {type(host.delta).__name__} depends on its input")
    uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    shared = {name: host for name, host in hosts.items() if uses[id(host.weight)] > 1}
    if shared and not untie:
        raise ValueError(f"{next(iter(shared))!r} shares its weight with another module; folding needs untie=True")
    if shared:
        _untie(model)
        warnings.warn(f"untied {', '.join(map(repr, shared))}: each use of a shared weight is now a copy", stacklevel=2)
    with torch.no_grad():
        for host in hosts.values():
            host_weight(host).add_(host.delta.weight())
    detach(model)


def _untie(model: nn.Module) -> None:
    """Copy what is shared; what stays as it was keeps the original, for the sake of optimizers that hold it."""
    seen: set[int] = set()
    part: Any
    for part in sorted(model.modules(), key=lambda module: type(module) in _PLAIN):
        for name, weight in part.named_parameters(recurse=False):
            if id(weight) in seen:
                setattr(part, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
            seen.add(id(weight))
        if getattr(getattr(part, "config", None), "tie_word_embeddings", False):
            part.config.tie_word_embeddings = False


def resize(
    param: nn.Parameter,
    optimizer: torch.optim.Optimizer,
    keep: Int[Tensor, "kept"] | Sequence[int],
    new: Float[Tensor, "..."] | None,
    dim: int,
) -> None:
    """Change a parameter's size along one dimension, in place, with its gradient and optimizer state.

    Groups and schedulers live on, as the parameter stays the same object. Call it in ``after_step`` only: a graph that
    is still alive pins the old shape.

    Parameters
    ----------
    param : Parameter
    optimizer : Optimizer
        Each of its tensors for ``param`` of the same shape is cut alike, and zeros are appended.
    keep : (kept,)
        Indices along ``dim`` that stay, in their new order.
    new : Tensor or None
        Values appended along ``dim``.
    dim : int

    Raises
    ------
    RuntimeError
        Under a distributed run, whose buckets are laid out for the old shape.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise RuntimeError("a parameter cannot change its shape in a distributed run: train in one process")
    old = param.shape
    indices = torch.as_tensor(keep, dtype=torch.long, device=param.device)
    if new is None:
        new = param.detach().narrow(dim, 0, 0)

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


def deltas(model: nn.Module, reference: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, LowRank | Dense]]:
    """The update of every module, whatever made it: a Delta, a PEFT layer, or training of the weight itself.

    Parameters
    ----------
    model : Module
        A PEFT model gives the names of its base model.
    reference : mapping parameter name -> Tensor, optional
        W_0 of weights that may have been trained; a name that is missing stands for an unchanged weight. A weight under
        several names is one update, under the first.

    Yields
    ------
    (str, LowRank or Dense)
        Copies: later training does not reach them.
    """
    root: Any = model
    if hasattr(model, "get_base_model"):
        root = root.get_base_model()
    counted: set[int] = set()
    module: Any
    for name, module in root.named_modules():
        before = (reference or {}).get(f"{name}.weight".lstrip("."))
        if before is not None and id(module.weight) in counted:
            before = None
        elif before is not None:
            counted.add(id(module.weight))
        update = peft_update(module) if is_peft_layer(module) else _own_update(module, before)
        if update is not None:
            yield name, update


def _own_update(module: Any, before: Tensor | None) -> LowRank | Dense | None:
    """The Delta's update and the weight's own change together."""
    delta = module.delta.update() if type(module) in _PLAIN else None
    if (
        before is None
        or before.ndim < 2
        or (delta is not None and torch.equal(before.to(module.weight), module.weight))
    ):
        return delta
    after = to_array(host_weight(module).double())
    change = Dense(after - to_array(orient_weight(module, before)))
    return change if delta is None else Dense(change.matrix + delta.dense())
