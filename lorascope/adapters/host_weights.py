"""Weights of modules, as the matrices of their linear maps and as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def host_weight(module: Any) -> Float[Tensor, "out in"]:
    """Return the weight as (out, in), a view of the stored tensor; a convolution's kernel is unfolded into ``in``."""
    return orient_weight(module, module.weight)


def host_bias(module: Any) -> Float[Tensor, "out"] | None:
    """Return the bias, or None."""
    return getattr(module, "bias", None)


def orient_weight(module: Any, weight: Shaped[Tensor, "..."]) -> Shaped[Tensor, "out in"]:
    """Return a tensor that has the layout of the module's weight as (out, in)."""
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight.flatten(1)


def host_kind(module: nn.Module) -> str:
    """Return the class name of a host without its adapter, such as ``"Linear"``."""
    own = (kind.__name__ for kind in (nn.Embedding, Conv1D, nn.Linear) if isinstance(module, kind))
    return next(own, type(module).__name__)


_SHARED: ContextVar[dict[Any, Shaped[np.ndarray, "..."]] | None] = ContextVar("shared", default=None)


@contextmanager
def shared_copies() -> Iterator[None]:
    """Let ``to_array`` copy each trained parameter only once in this context; do not modify the shared arrays."""
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def to_array(tensor: Tensor) -> Shaped[np.ndarray, "..."]:
    """Return a copy as a numpy array; bfloat16, which numpy does not support, becomes float32."""
    shared = _SHARED.get()
    owner = tensor if tensor._base is None else tensor._base
    # Only trained parameters are shared: copies of the frozen base would double its memory, and the addresses of other
    # tensors may be reused after they are freed.
    if shared is None or not (isinstance(owner, nn.Parameter) and owner.requires_grad):
        return _copy_to_numpy(tensor)
    key = (tensor.data_ptr(), tensor.shape, tensor.stride())
    if key not in shared:
        shared[key] = _copy_to_numpy(tensor)
    return shared[key]


def _copy_to_numpy(tensor: Tensor) -> Shaped[np.ndarray, "..."]:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy().copy()
