"""Weights of modules, as the matrices of their linear maps and as numpy arrays."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorascope.array_types import Float, Shaped

_PACKED_BITS = {"Params4bit": 4, "Int8Params": 8}


def host_weight(module: Any) -> Float[Tensor, "out in"]:
    """Return a host's weight as (out, in), a view of its tensor; a convolution's kernel is unfolded into ``in``.

    The weight of a quantized layer of bitsandbytes is dequantized, which is a copy.
    """
    if packed_bits(module):
        return _dequantize(module)
    return orient_weight(module, module.weight)


def packed_bits(module: nn.Module) -> int:
    """Return the bits per weight of a quantized layer of bitsandbytes, 4 or 8; 0 for any other module."""
    # By name, because an import of bitsandbytes takes time and prints lines.
    return _PACKED_BITS.get(type(getattr(module, "weight", None)).__name__, 0)


def entry_count(parameter: nn.Parameter) -> int:
    """Return the number of entries of a parameter; that of 4-bit weights is the one before they were packed."""
    quantization = getattr(parameter, "quant_state", None)
    if quantization is None:
        return parameter.numel()
    return math.prod(quantization.shape)


def _dequantize(module: Any) -> Float[Tensor, "out in"]:
    """Return the weight of a quantized layer of bitsandbytes as a tensor of floats."""
    weight = module.weight
    if packed_bits(module) == 4:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    # The first forward pass moves codes and scales from the weight to the state of the layer.
    codes, scales = weight.CB, weight.SCB
    if codes is None:
        codes, scales = module.state.CB, module.state.SCB
    return codes.float() * (scales.float().unsqueeze(1) / 127)


def orient_weight(module: Any, weight: Shaped[Tensor, "..."]) -> Shaped[Tensor, "out in"]:
    """Return a tensor in the layout of its host's weight as (out, in)."""
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight.flatten(1)


def dequantized_weight(module: Any) -> Float[Tensor, "out in"]:
    """Return a host's weight as (out, in), for a 4-bit or 8-bit layer of bitsandbytes or one that PEFT dequantizes."""
    if packed_bits(module):
        return _dequantize(module)
    from peft.utils.integrations import dequantize_module_weight

    stored = module.weight
    try:
        return orient_weight(module, dequantize_module_weight(module).detach())
    finally:
        module.weight = stored  # on a CPU, PEFT replaces 8-bit weights by copies without their scales


def host_kind(module: nn.Module) -> str:
    """Return the class name of a host whose weight is adapted, without its adapter, such as ``"Linear"``.

    For a part of a fused weight, it is the class of the fused module.
    """
    module = getattr(module, "fused", module)
    for kind in (nn.Embedding, Conv1D, nn.Linear):
        if isinstance(module, kind):
            return kind.__name__
    return type(module).__name__


# Copies by the memory of their tensors, which are referenced so that no other tensor gets their address.
_SHARED: ContextVar[dict[Any, tuple[Tensor, Shaped[np.ndarray, "..."]]] | None] = ContextVar("shared", default=None)


@contextmanager
def shared_copies() -> Iterator[None]:
    """Let ``to_array`` and ``to_host`` copy each trained weight only once in this context.

    The tensors that ``to_host`` has copied are shared as well. A context in another one shares the copies of the outer
    one. Do not modify the shared arrays, or the tensors before the context ends.
    """
    if _SHARED.get() is not None:
        yield
        return
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def to_array(tensor: Tensor) -> Shaped[np.ndarray, "..."]:
    """Return a copy of a host weight, or of another tensor, as a numpy array; bfloat16 becomes float32."""
    shared = _SHARED.get()
    if shared is not None:
        if (pair := shared.get(_memory(tensor))) is not None:
            return pair[1]
        owner = tensor
        if tensor._base is not None:  # a view, such as the transposed weight of a Conv1D
            owner = tensor._base
        # Other tensors are not shared by themselves: copies of the frozen base would double its memory.
        if isinstance(owner, nn.Parameter) and owner.requires_grad:
            return to_host([tensor])[0]
    return _transfer([tensor])[0]


def to_host(tensors: Sequence[Tensor]) -> list[Shaped[np.ndarray, "..."]]:
    """Return copies of host weights, or of other tensors, as numpy arrays, in one transfer from their device."""
    shared = _SHARED.get()
    if shared is None:
        return _transfer(tensors)
    keys = list(map(_memory, tensors))
    new = {}
    for key, tensor in zip(keys, tensors, strict=True):
        if key not in shared:
            new[key] = tensor
    for (key, tensor), copy in zip(new.items(), _transfer(list(new.values())), strict=True):
        shared[key] = tensor, copy
    return [shared[key][1] for key in keys]


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _transfer(tensors: Sequence[Tensor]) -> list[Shaped[np.ndarray, "..."]]:
    """Copy tensors to numpy arrays, in one transfer per accelerator."""
    wide: list[Tensor] = []
    indices: dict[torch.device, list[int]] = defaultdict(list)
    for i, tensor in enumerate(map(Tensor.detach, tensors)):
        if tensor.device.type != "cpu":
            indices[tensor.device].append(i)
        if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16
            tensor = tensor.float()
        wide.append(tensor)
    for on_device in indices.values():
        for i, tensor in zip(on_device, through_buffer([wide[i] for i in on_device]), strict=True):
            wide[i] = tensor
    return [tensor.numpy().copy() for tensor in wide]


def through_buffer(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy host weights from one device to the CPU through a single buffer, each at a multiple of 8 bytes."""
    # ``view`` requires that each tensor starts at a multiple of its element size.
    padded = [F.pad(tensor.reshape(-1).view(torch.uint8), (0, -tensor.nbytes % 8)) for tensor in tensors]
    copies = torch.cat(padded).cpu().split(list(map(len, padded)))
    restored = []
    for copy, tensor in zip(copies, tensors, strict=True):
        restored.append(copy[: tensor.nbytes].view(tensor.dtype).reshape(tensor.shape))
    return restored
