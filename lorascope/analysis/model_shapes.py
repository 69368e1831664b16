"""Parameter shapes ``{parameter name: shape}`` of a live model or a model family; a tied weight counts once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from lorascope.schema.module_table import parse

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]


def shapes_of(model: Any) -> dict[str, Shape]:
    """Return the parameter shapes of a live model."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def llama(layers: int, hidden: int, inner: int, keys: int, vocabulary: int = 32_000) -> dict[str, Shape]:
    """Return the parameter shapes of a LLaMA model.

    Parameters
    ----------
    layers, hidden, inner : int
        Number of blocks, hidden size, and inner size of the feed-forward modules.
    keys : int
        Total size of the keys (and of the values) over all attention heads.
    vocabulary : int
        Vocabulary size, 32,000 by default.
    """
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    blocks = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    ends: dict[str, Shape] = {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {"model.embed_tokens.weight": (vocabulary, hidden), **blocks, **ends}


def gpt2(layers: int, hidden: int, vocabulary: int = 50_257, positions: int = 1024) -> dict[str, Shape]:
    """Return the parameter shapes of a GPT-2 model, whose head is tied to its embedding."""
    block: dict[str, Shape] = {}
    for name, outputs, inputs in (
        ("attn.c_attn", 3, 1),
        ("attn.c_proj", 1, 1),
        ("mlp.c_fc", 4, 1),
        ("mlp.c_proj", 1, 4),
    ):
        block |= {f"{name}.weight": (inputs * hidden, outputs * hidden), f"{name}.bias": (outputs * hidden,)}
    norms = {f"{norm}.{part}": (hidden,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    blocks = {f"transformer.h.{i}.{name}": shape for i in range(layers) for name, shape in (block | norms).items()}
    ends = {"transformer.wte.weight": (vocabulary, hidden), "transformer.wpe.weight": (positions, hidden)}
    return ends | blocks | {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}


LLAMA2 = {"7B": llama(32, 4096, 11_008, 4096), "70B": llama(80, 8192, 28_672, 1024)}
GPT2 = {"117M": gpt2(12, 768), "345M": gpt2(24, 1024)}


def size(shapes: Shapes) -> int:
    """Count the parameters of a model."""
    return count(shapes.values())


def blocks(shapes: Shapes) -> dict[tuple[str, int], dict[str, Shape]]:
    """Return the parameter shapes of every block, by stack and layer."""
    found: dict[tuple[str, int], dict[str, Shape]] = {}
    for name, shape in shapes.items():
        place = parse(name)
        if place.layer is not None:
            found.setdefault((place.stack, place.layer), {})[name] = shape
    return found


def count(shapes: Iterable[Shape]) -> int:
    """Count the entries of tensors with these shapes."""
    return sum(map(math.prod, shapes))
