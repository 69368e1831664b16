"""Quantization of the linear layers in the blocks of a model, by bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.adapters.host_weights import packed_bits
from lorascope.schema import module_table

QUANTIZATIONS = ("nf4", "int8")


def require_bitsandbytes(kind: str) -> None:
    """Raise a ValueError if bitsandbytes is not installed, which ``quantize=kind`` requires."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize {kind!r} requires bitsandbytes: pip install 'lorascope[quantized]'")


def has_packed_weights(model: nn.Module) -> bool:
    """Return whether a layer of a model has 4-bit or 8-bit weights of bitsandbytes."""
    return any(packed_bits(module) for module in model.modules())


def quantize_blocks(model: nn.Module, kind: str, device: str) -> None:
    """Replace the linear layers in the blocks of a model by quantized ones on a device.

    Embeddings, norms, biases, the task's head and the output layer of a language model stay as they are, and so do
    weights that several modules share. Layers compute in the dtype of their weight; those of 8 bits in float16.

    Parameters
    ----------
    model : Module
    kind : {"nf4", "int8"}
        4-bit NormalFloat in blocks of 64 weights, as in QLoRA without double quantization, or LLM.int8().
    device : str
        Device of the quantized layers, which are moved one after the other.

    Raises
    ------
    ValueError
        No block has a linear layer, such as in GPT-2, whose layers are of another class.
    """
    description = module_table.describe(model)
    blocks = tuple(f"{name}." for name in description["module"][description["role"] == "block"])
    uses: Counter[Any] = Counter()
    for module in model.modules():
        uses.update(module.parameters(recurse=False))
    count = 0
    for name, module in [*model.named_modules()]:
        # Only exact classes, because a subclass may compute something else.
        if type(module) is nn.Linear and name.startswith(blocks) and uses[module.weight] == 1:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _quantized_layer(module, kind, device))
            count += 1
    if not count:
        raise ValueError(f"cannot quantize {type(model).__name__}: its blocks have no nn.Linear")


def _quantized_layer(linear: nn.Linear, kind: str, device: str) -> nn.Module:
    """Return a quantized copy of a layer, on a device."""
    # Imported here, because it takes time and prints lines.
    import bitsandbytes

    from lorascope.adapters.quantized_layers import StableLinear4bit

    sizes: dict[str, Any] = {"input_features": linear.in_features, "output_features": linear.out_features}
    sizes |= {"bias": linear.bias is not None, "device": "meta"}
    weight: Tensor = linear.weight.detach()
    layer: Any
    if kind == "nf4":
        layer = StableLinear4bit(**sizes, quant_type=kind, compute_dtype=weight.dtype)
        packed = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type=kind, compress_statistics=False, module=layer
        )
    else:
        layer = bitsandbytes.nn.Linear8bitLt(**sizes, has_fp16_weights=False)
        # A copy, because the 8-bit layer writes its codes into the memory of the weight.
        packed = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer.weight, layer.bias = packed, linear.bias
    layer.train(linear.training)
    # The move quantizes, also to the device that the weight is on.
    return layer.to(torch.device(device))
