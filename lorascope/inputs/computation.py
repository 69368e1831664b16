"""Attention, gradient checkpointing and precision of the weights of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import is_flash_attn_2_available

from lorascope.files.printable import first_line
from lorascope.inputs.models import quiet

ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
DTYPES = ("float32", "bfloat16", "float16")


def set_dtype(model: nn.Module, name: str | None) -> None:
    """Convert the weights of a model to a dtype by its name in torch; None leaves them as they are.

    Weights that transformers keeps in float32, and buffers that no checkpoint contains, are not converted.
    """
    if name is None:
        return
    dtype = getattr(torch, name)
    living: Any = model
    wide: list[str] = []
    if hasattr(model, "_get_dtype_plan"):
        wide += living._get_dtype_plan(dtype)
    persistent = model.state_dict(keep_vars=True)
    # Frequencies of rotary embeddings are such buffers: rounded ones would move the positions of later tokens.
    buffers = {key: buffer for key, buffer in model.named_buffers() if key in persistent}
    for key, tensor in (*model.named_parameters(), *buffers.items()):
        if tensor.is_floating_point() and not set(wide).intersection(key.split(".")):
            tensor.data = tensor.data.to(dtype)


def set_attention(model: nn.Module, name: str | None, precision: str) -> None:
    """Set the implementation of attention of a model by its name in transformers; None leaves that of the model.

    Raises
    ------
    ValueError
        The model is not of transformers, it has no such implementation, or the implementation is not installed or does
        not have the precision.
    """
    if name is None:
        return
    living: Any = model
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"cannot set the attention of {type(model).__name__}: it is not a model of transformers")
    if name == "flash_attention_2":
        if precision == "fp32" and living.dtype == torch.float32:
            raise ValueError(f"attention {name!r} requires precision='bf16', got {precision!r}")
        # Without the package, transformers fetches a kernel from the Hugging Face Hub and runs its code.
        if not is_flash_attn_2_available():
            raise ValueError(f"attention {name!r} requires flash-attn: pip install flash-attn")
    try:
        with quiet():
            living.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        # The first sentence has the reason, further ones have links.
        reason = first_line(error).partition(". ")[0]
        raise ValueError(f"cannot set attention {name!r}: {reason}") from error
    if living.config._attn_implementation != name:
        raise ValueError(f"cannot set attention {name!r}: {type(model).__name__} has its own implementation")


def enable_checkpointing(model: nn.Module) -> None:
    """Enable gradient checkpointing: backward passes compute the activations of each block again.

    Raises
    ------
    ValueError
        The model cannot do this.
    """
    living: Any = model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"cannot checkpoint the gradients of {type(model).__name__}: transformers does not support it")
    # The old name warns since transformers 5.24.
    name = "activation_checkpointing_enable"
    if not hasattr(model, name):
        name = "gradient_checkpointing_enable"
    # A reentrant checkpoint has no gradients unless the input of the block requires one.
    getattr(living, name)({"use_reentrant": False})
