"""Computed memory of a training step: bytes of parameters, gradients and optimizer state for each training method.

A model is given by its shapes ``{parameter name: shape}``, in which a tied weight counts once. N is its number of
parameters and T the number of trained ones. Sums are over the m x n matrices that an optimizer factors; v is the number
of other parameters, stored without factors. The optimizer state has this many entries:

==============  ====================================================================
AdamW           2 T, and a step count per tensor, as in torch
LoRA            AdamW with T = sum of rank (m + n)
LISA            AdamW with T = parameters outside the blocks and of the active blocks
Adapprox        N (first moment) + sum of k (m + n) + v
Adafactor       N (first moment) + sum of (m + n) + v
CAME            N + 2 sum of (m + n) + v
==============  ====================================================================

Adapprox reshapes a tensor with more dimensions to one matrix: the first side by all others. Adafactor and CAME treat it
as a stack of matrices over its last two sides.

Activations are not included: they depend on batch, text and kernels, and have to be measured. The float32 copies that
``train`` keeps of trained 16-bit weights are not included either, as in the papers: they take 4 bytes per weight.

Source: LISA (arXiv 2403.17919), section 3.2; Adafactor (arXiv 1804.04235); CAME (arXiv 2307.02047); Adapprox (arXiv
2403.14958), whose savings these formulas reproduce to the printed digit for k from 1 to a quarter of the smaller side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import pandas as pd

from lorascope.files.printable import count_phrase
from lorascope.schema.fused_parts import PART_ROLES, name_of_part, split_part_name
from lorascope.schema.module_table import match, parse

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]

COMPONENTS = ("parameters", "gradients", "optimizer")
POLICIES = ("keep", "reset", "reset_all")
RANK_SHARE = 0.25  # largest rank of Adapprox, as a fraction of the smaller side of a matrix
_STATE, _COUNT = 4, 4  # bytes of an entry of the optimizer state, and of torch's step count


def shapes_of(model: Any) -> dict[str, Shape]:
    """Return the parameter shapes of a live model for a memory estimate."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def llama(layers: int, hidden: int, inner: int, keys: int, vocabulary: int = 32_000) -> dict[str, Shape]:
    """Return the parameter shapes of a LLaMA model for a memory estimate.

    ``inner`` is the inner size of the feed-forward modules, ``keys`` the size of the keys of all attention heads.
    """
    block = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    ends: dict[str, Shape] = {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {"model.embed_tokens.weight": (vocabulary, hidden)} | _repeat("model.layers", layers, block) | ends


def gpt2(layers: int, hidden: int, vocabulary: int = 50_257, positions: int = 1024) -> dict[str, Shape]:
    """Return the parameter shapes of a GPT-2 model, whose head is tied to its embedding, for a memory estimate."""
    linears = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
    block: dict[str, Shape] = {}
    for name, (outputs, inputs) in linears.items():  # a Conv1D stores its weight transposed, as (inputs, outputs)
        block |= {f"{name}.weight": (inputs * hidden, outputs * hidden), f"{name}.bias": (outputs * hidden,)}
    for norm in ("ln_1", "ln_2"):
        block |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    embeddings = {"transformer.wte.weight": (vocabulary, hidden), "transformer.wpe.weight": (positions, hidden)}
    last_norm = {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}
    return embeddings | _repeat("transformer.h", layers, block) | last_norm


def _repeat(stack: str, layers: int, block: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the parameter shapes of equal blocks."""
    return {f"{stack}.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}


# In the 70B model, eight query heads share one key head.
LLAMA2 = {"7B": llama(32, 4096, 11_008, 4096), "70B": llama(80, 8192, 28_672, 1024)}
GPT2 = {"117M": gpt2(12, 768), "345M": gpt2(24, 1024)}


def count_parameters(shapes: Shapes) -> int:
    """Count the parameters of a model for a memory estimate."""
    return _count(shapes.values())


def shapes_by_block(shapes: Shapes) -> dict[tuple[str, int], dict[str, Shape]]:
    """Return the parameter shapes of every block for a memory estimate, by stack and layer."""
    by_block: dict[tuple[str, int], dict[str, Shape]] = {}
    for name, shape in shapes.items():
        stack, layer, _ = parse(name)
        if layer is not None:
            by_block.setdefault((stack, layer), {})[name] = shape
    return by_block


def _count(shapes: Iterable[Shape]) -> int:
    """Count the entries of tensors with these shapes."""
    return sum(map(math.prod, shapes))


@dataclass(frozen=True)
class MemoryUse:
    """Memory estimate: bytes of parameters, gradients and optimizer state, allocated at the optimizer step."""

    parameters: int
    gradients: int
    optimizer: int


def full(shapes: Shapes, *, width: int = 4) -> MemoryUse:
    """Estimate the memory of AdamW on all parameters.

    Parameters
    ----------
    shapes : mapping parameter name -> shape
        Shapes of the model, see ``shapes_of``, ``llama`` and ``gpt2``.
    width : int
        Bytes per weight and per gradient entry, 4 by default. Entries of the optimizer state always have 4.
    """
    return _adamw(count_parameters(shapes), shapes.values(), width)


def lora(
    shapes: Shapes,
    rank: int,
    targets: str | Sequence[str] = ("q", "v"),
    beside: Collection[str] = (),
    *,
    width: int = 4,
) -> MemoryUse:
    """Estimate the memory of AdamW on the two LoRA factors of every target.

    Parameters
    ----------
    shapes, width
        See ``full``.
    rank : int
        Rank of every adapter.
    targets : str or sequence of str
        Target modules as in ``LoRA(targets=...)``; see ``module_table.match``. By default queries and values.
    beside : collection of str
        Names of parameters that are trained directly as well, such as a classifier head; empty by default.
    """
    matrices: dict[str, Any] = {name.removesuffix(".weight"): s for name, s in shapes.items() if len(s) == 2}
    rows: list[Any] = [
        (module, *parse(module), *shape, "") for module, shape in matrices.items()
    ]  # a tied weight counts once
    for module, shape in _fused_parts(matrices).items():
        fused, role = split_part_name(module) or ("", "")
        rows.append((module, *parse(fused)[:2], role, *shape, ""))
        matrices[module] = shape
    columns = ["module", "stack", "layer", "role", "out_features", "in_features", "tied"]
    adapted = match(pd.DataFrame(rows, columns=columns).astype({"layer": "Int16"}), targets)
    factors: list[Shape] = []
    for module in adapted:
        outputs, inputs = matrices[module]
        factors += [(rank, inputs), (outputs, rank)]
    direct = [shapes[name] for name in beside]
    return _adamw(count_parameters(shapes) + _count(factors), factors + direct, width)


def _fused_parts(matrices: Shapes) -> dict[str, Shape]:
    """Return the shapes of the parts of fused weights, with as many queries as the output projection has inputs."""
    part_shapes: dict[str, Shape] = {}
    outputs = {name.rpartition(".")[0]: shape for name, shape in matrices.items() if parse(name).role == "o"}
    for name, shape in matrices.items():
        parent = name.rpartition(".")[0]
        if parse(name).role != "qkv" or parent not in outputs:
            continue
        # A fused weight has more outputs than inputs, also if it is stored as (in, out).
        is_transposed = shape[0] < shape[1]
        queries = outputs[parent][0 if is_transposed else 1]
        keys = (max(shape) - queries) // 2
        for role, count in zip(PART_ROLES, (queries, keys, keys), strict=True):
            part_shapes[name_of_part(name, role)] = (count, min(shape))
    return part_shapes


def lisa(
    shapes: Shapes,
    active: int | None = None,
    policy: str = "reset",
    visited: int | None = None,
    *,
    width: int = 4,
) -> MemoryUse:
    """Estimate the memory of AdamW on the parameters outside the blocks and on a few active blocks, as in LISA.

    Parameters
    ----------
    shapes, width
        See ``full``.
    active : int, optional
        Number of blocks trained at a time; by default two, or all if the model has fewer. If blocks differ in size,
        the largest ones are counted, so this is an upper bound.
    policy : {"keep", "reset", "reset_all"}
        Optimizer state when blocks become inactive: keep it, drop it, or drop the state of all parameters. The default
        is "reset". At the end of a step, "reset" and "reset_all" need the same memory.
    visited : int, optional
        Number of blocks that were active so far; by default all. Only ``policy="keep"`` uses it.

    Raises
    ------
    ValueError
        The policy is unknown, or ``active`` or ``visited`` does not fit the number of blocks.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    # The largest blocks come first, because they give the upper bound.
    block_shapes = sorted(shapes_by_block(shapes).values(), key=count_parameters, reverse=True)
    if active is None:
        active = min(2, len(block_shapes))
    if not 0 <= active <= len(block_shapes):
        raise ValueError(f"active must be from 0 to {len(block_shapes)}, the number of blocks, got {active}")
    with_state = active
    if policy == "keep":  # a block that becomes inactive again keeps its state
        with_state = len(block_shapes) if visited is None else visited
    if not active <= with_state <= len(block_shapes):
        raise ValueError(
            f"visited must be from {active} (active blocks) to {len(block_shapes)} (all blocks), got {with_state}"
        )
    inside = set(chain.from_iterable(block_shapes))
    outside = [shape for name, shape in shapes.items() if name not in inside]

    def with_blocks(number: int) -> list[Shape]:
        """Return the shapes outside the blocks and of this number of blocks."""
        return outside + list(chain.from_iterable(map(dict.values, block_shapes[:number])))

    memory = _adamw(count_parameters(shapes), with_blocks(with_state), width)
    return replace(memory, gradients=width * _count(with_blocks(active)))


def expect_visited_blocks(blocks: int, active: int, intervals: int) -> float:
    """Compute the expected number of blocks in LISA's memory estimate, trained by n draws: L (1 - (1 - gamma / L)^n).

    L is the number of ``blocks`` of the model, gamma that of ``active`` blocks at a time, and n that of ``intervals``.
    """
    return blocks * (1 - (1 - active / blocks) ** intervals)


def adapprox(
    shapes: Shapes,
    rank: int | Mapping[str, int] | None = 1,
    first: bool = True,
    min_dim: int | None = 64,
    *,
    width: int = 4,
) -> MemoryUse:
    """Estimate the memory of Adapprox, which stores second moments as factors of rank k.

    Parameters
    ----------
    shapes, width
        See ``full``.
    rank : int, mapping parameter name -> int, or None
        Current ranks, at most the smaller side of a matrix; 1 by default. None: the largest allowed, a quarter of it.
    first : bool
        Whether there is a first moment (beta_1 > 0), True by default.
    min_dim : int or None
        Smallest side of a matrix whose second moment is stored as factors, 64 by default. None factors no matrix.
    """

    def second(name: str, shape: Shape) -> int:
        sides = math.prod(shape[:1]), math.prod(shape[1:])
        if len(shape) < 2 or min_dim is None or min(sides) < min_dim:
            return math.prod(shape)
        if rank is None:
            k = max(1, int(RANK_SHARE * min(sides)))
        elif isinstance(rank, int):
            k = rank
        else:
            k = rank[name]
        return min(k, *sides) * sum(sides)

    return _factored_memory(shapes, second, first, width)


def adafactor(shapes: Shapes, first: bool = True, *, width: int = 4) -> MemoryUse:
    """Estimate the memory of Adafactor, which stores second moments as row and column means; see ``adapprox``."""
    return _factored_memory(shapes, lambda _, shape: _count_means(shape), first, width)


def came(shapes: Shapes, *, width: int = 4) -> MemoryUse:
    """Estimate the memory of CAME: Adafactor with a second pair of means, of the instability; see ``full``."""
    return _factored_memory(shapes, lambda _, shape: _count_means(shape, 2), True, width)


def compare_methods(shapes: Shapes, rank: int = 128, active: int | None = None, *, width: int = 4) -> pd.DataFrame:
    """Estimate the memory of every training method for one model.

    Parameters
    ----------
    shapes, width
        See ``full``.
    rank : int
        Rank of LoRA, 128 by default. As in LISA's paper, it adapts all linear layers, embedding and an untied head.
    active : int, optional
        Number of active blocks of LISA, see ``lisa``.

    Returns
    -------
    DataFrame
        ``method, part, bytes, source``, with "computed" as the source.
    """
    # A model can lack an embedding or a separate head, and an unknown role is an error.
    roles = {parse(name.removesuffix(".weight")).role for name in shapes}
    everything = ["all-linear", *sorted(roles & {"embed", "head"})]
    if active is None:
        active = min(2, len(shapes_by_block(shapes)))
    return _memory_rows(
        {
            "AdamW": full(shapes, width=width),
            f"LoRA, rank {rank}": lora(shapes, rank, everything, width=width),
            f"LISA, {count_phrase(active, 'block')}": lisa(shapes, active, width=width),
            **_factorings(shapes, True, width),
            "CAME": came(shapes, width=width),
        }
    )


def compare_optimizers(shapes: Shapes) -> pd.DataFrame:
    """Estimate the memory of every optimizer that trains all weights, with and (if possible) without a first moment.

    Every number has 4 bytes; columns: see ``compare_methods``.
    """
    without = {f"{name}, β₁ = 0": memory for name, memory in _factorings(shapes, False).items()}
    return _memory_rows({"AdamW": full(shapes), **_factorings(shapes, True), "CAME": came(shapes), **without})


def _factorings(shapes: Shapes, first: bool, width: int = 4) -> dict[str, MemoryUse]:
    """Return the memory of the optimizers that also work without a first moment."""
    return {
        "Adapprox, rank 1": adapprox(shapes, 1, first, width=width),
        "Adapprox, largest rank": adapprox(shapes, None, first, width=width),
        "Adafactor": adafactor(shapes, first, width=width),
    }


def _memory_rows(ways: Mapping[str, MemoryUse]) -> pd.DataFrame:
    rows = []
    for method, memory in ways.items():
        rows += [(method, component, getattr(memory, component), "computed") for component in COMPONENTS]
    return pd.DataFrame(rows, columns=["method", "part", "bytes", "source"])


def _adamw(numbers: int, trained: Collection[Shape], width: int) -> MemoryUse:
    entries = _count(trained)
    return MemoryUse(width * numbers, width * entries, 2 * _STATE * entries + _COUNT * len(trained))


def _count_means(shape: Shape, pairs: int = 1) -> int:
    """Count the entries of ``pairs`` pairs of row and column means per matrix; a vector is stored once, as it is."""
    if len(shape) < 2:
        return math.prod(shape)
    return pairs * math.prod(shape[:-2]) * sum(shape[-2:])


def _factored_memory(shapes: Shapes, second: Callable[[str, Shape], int], first: bool, width: int) -> MemoryUse:
    """Return the memory if all parameters train; ``second`` counts the entries stored for a second moment."""
    numbers = count_parameters(shapes)
    entries = first * numbers + sum(map(second, shapes, shapes.values()))
    return MemoryUse(width * numbers, width * numbers, _STATE * entries)
