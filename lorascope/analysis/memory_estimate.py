"""Computed memory of a training step: bytes of parameters, gradients and optimizer state for each training method.

A model is given by its shapes, see ``model_shapes``. N is its number of parameters and T the number of trained ones.
Sums are over the m x n matrices that an optimizer factors; v is the number of other parameters, stored without factors.
The optimizer state has this many entries:

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

Activations are not included: they depend on batch, text and kernels, and have to be measured.

Source: LISA (arXiv 2403.17919), section 3.2; Adapprox (arXiv 2403.14958), whose published savings these formulas
reproduce to the printed digit for k from 1 to a quarter of the smaller side; Adafactor (arXiv 1804.04235); CAME (arXiv
2307.02047).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from lorascope.analysis.model_shapes import GPT2, LLAMA2, Shape, Shapes, blocks, count, gpt2, llama, shapes_of, size
from lorascope.schema.deprecation import old_names
from lorascope.schema.module_table import match, parse

__all__ = [
    "GPT2",
    "LLAMA2",
    "PARTS",
    "POLICIES",
    "RANK_SHARE",
    "MemoryUse",
    "adafactor",
    "adapprox",
    "blocks",
    "came",
    "expect_visited_blocks",
    "full",
    "gpt2",
    "lisa",
    "llama",
    "lora",
    "optimizers",
    "shapes_of",
    "size",
    "table",
]

PARTS = ("parameters", "gradients", "optimizer")
POLICIES = ("keep", "reset", "reset_all")
RANK_SHARE = 0.25  # largest rank of Adapprox, as a fraction of the smaller side of a matrix
_COUNT = 4  # bytes of torch's step count


@dataclass(frozen=True)
class MemoryUse:
    """Memory allocated at the optimizer step, in bytes.

    Parameters
    ----------
    parameters, gradients, optimizer : int
        Bytes of the parameters, their gradients and the optimizer state.
    """

    parameters: int
    gradients: int
    optimizer: int


def full(shapes: Shapes, *, width: int = 4, state: int = 4) -> MemoryUse:
    """Compute the memory of AdamW on all parameters.

    Parameters
    ----------
    shapes : mapping parameter name -> shape
        Shapes of the model, see ``model_shapes``.
    width : int
        Bytes per weight and per gradient entry, 4 by default.
    state : int
        Bytes per entry of the optimizer state, 4 by default.
    """
    return _adamw(size(shapes), shapes.values(), width, state)


def lora(
    shapes: Shapes,
    rank: int,
    targets: str | Sequence[str] = ("q", "v"),
    beside: Collection[str] = (),
    *,
    width: int = 4,
    state: int = 4,
) -> MemoryUse:
    """Compute the memory of AdamW on the two LoRA factors of every target.

    Parameters
    ----------
    shapes, width, state
        See ``full``.
    rank : int
        Rank of every adapter.
    targets : str or sequence of str
        Target modules as in ``LoRA(targets=...)``; see ``names.match``. By default queries and values.
    beside : collection of str
        Names of parameters that are trained directly as well, such as a classifier head; empty by default.
    """
    factors = [pair for out, into in _match_targets(shapes, targets) for pair in ((rank, into), (out, rank))]
    trained = [*factors, *(shapes[name] for name in beside)]
    return _adamw(size(shapes) + count(factors), trained, width, state)


def lisa(
    shapes: Shapes,
    active: int | None = None,
    policy: str = "reset",
    visited: int | None = None,
    *,
    width: int = 4,
    state: int = 4,
) -> MemoryUse:
    """Compute the memory of AdamW on the parameters outside the blocks and on a few active blocks.

    Parameters
    ----------
    shapes, width, state
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
    parts = sorted(blocks(shapes).values(), key=size, reverse=True)  # the largest blocks give the upper bound
    active = _blocks_at_a_time(active, len(parts))
    if not 0 <= active <= len(parts):
        raise ValueError(f"active must be from 0 to {len(parts)}, the number of blocks, got {active}")
    with_state = (len(parts) if visited is None else visited) if policy == "keep" else active
    if not active <= with_state <= len(parts):
        raise ValueError(
            f"visited must be from {active} (active blocks) to {len(parts)} (all blocks), got {with_state}"
        )
    inside = {name for part in parts for name in part}
    outside = [shape for name, shape in shapes.items() if name not in inside]
    now, stated = ([*outside, *(s for part in parts[:n] for s in part.values())] for n in (active, with_state))
    memory = _adamw(size(shapes), stated, width, state)
    return MemoryUse(memory.parameters, width * count(now), memory.optimizer)


def _blocks_at_a_time(active: int | None, blocks: int) -> int:
    """Return the number of active blocks (LISA's gamma), as given or by default."""
    return min(2, blocks) if active is None else active


def expect_visited_blocks(blocks: int, active: int, intervals: int) -> float:
    """Compute the expected number of different blocks LISA has trained after n draws: L (1 - (1 - gamma / L)^n).

    Parameters
    ----------
    blocks : int
        Number of blocks of the model, L.
    active : int
        Number of blocks trained at a time, gamma.
    intervals : int
        Number of draws, n.
    """
    return blocks * (1 - (1 - active / blocks) ** intervals)


def adapprox(
    shapes: Shapes,
    rank: int | Mapping[str, int] | None = 1,
    first: bool = True,
    min_dim: int | None = 64,
    *,
    width: int = 4,
    state: int = 4,
) -> MemoryUse:
    """Compute the memory of Adapprox, which stores second moments as factors of rank k.

    Parameters
    ----------
    shapes, width, state
        See ``full``.
    rank : int, mapping parameter name -> int, or None
        Current ranks, at most the smaller side of each matrix; 1 by default. None means the largest allowed rank, a
        quarter of the smaller side.
    first : bool
        Whether there is a first moment (beta_1 > 0), True by default.
    min_dim : int or None
        Matrices whose smaller side is below this store their second moment without factors; 64 by default. None stores
        all matrices without factors.
    """

    def second(name: str, shape: Shape) -> int:
        matrix: Shape = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else ()
        if not matrix or min_dim is None or min(matrix) < min_dim:
            return math.prod(shape)
        if rank is None:
            return max(1, int(RANK_SHARE * min(matrix))) * sum(matrix)
        return min(rank if isinstance(rank, int) else rank[name], *matrix) * sum(matrix)

    return _factored_memory(shapes, second, first, width, state)


def adafactor(shapes: Shapes, first: bool = True, *, width: int = 4, state: int = 4) -> MemoryUse:
    """Compute the memory of Adafactor, which stores second moments as row and column means; see ``adapprox``."""
    return _factored_memory(shapes, lambda _, shape: _count_means(shape), first, width, state)


def came(shapes: Shapes, *, width: int = 4, state: int = 4) -> MemoryUse:
    """Compute the memory of CAME: Adafactor with a second pair of means, of the instability; see ``full``."""
    return _factored_memory(shapes, lambda _, shape: _count_means(shape, 2), True, width, state)


def table(
    shapes: Shapes, rank: int = 128, active: int | None = None, *, width: int = 4, state: int = 4
) -> pd.DataFrame:
    """Compute the memory of every training method for one model.

    Parameters
    ----------
    shapes, width, state
        See ``full``.
    rank : int
        Rank of LoRA, 128 by default. As in LISA's paper, LoRA adapts all linear layers, embedding and head; a head tied
        to the embedding counts once.
    active : int, optional
        Number of active blocks of LISA, see ``lisa``.

    Returns
    -------
    DataFrame
        ``method, part, bytes, source``, with "computed" as the source.
    """
    # A model can lack an embedding or a separate head, and an unknown role is an error.
    roles = {parse(name.removesuffix(".weight")).role for name in shapes}
    everything = ["all-linear", *(role for role in ("embed", "head") if role in roles)]
    active = _blocks_at_a_time(active, len(blocks(shapes)))
    return _memory_rows(
        {
            "AdamW": full(shapes, width=width, state=state),
            f"LoRA, rank {rank}": lora(shapes, rank, everything, width=width, state=state),
            f"LISA, {active} block{'s' * (active != 1)}": lisa(shapes, active, width=width, state=state),
            **_factorings(shapes, True, width, state),
            "CAME": came(shapes, width=width, state=state),
        }
    )


def optimizers(shapes: Shapes, *, width: int = 4, state: int = 4) -> pd.DataFrame:
    """Compute the memory of every optimizer that trains all weights, with and (where possible) without a first moment.

    Parameters
    ----------
    shapes, width, state
        See ``full``.

    Returns
    -------
    DataFrame
        The columns of ``table``.
    """
    return _memory_rows(
        {
            "AdamW": full(shapes, width=width, state=state),
            **_factorings(shapes, True, width, state),
            "CAME": came(shapes, width=width, state=state),
            **_factorings(shapes, False, width, state),
        }
    )


def _factorings(shapes: Shapes, first: bool, width: int, state: int) -> dict[str, MemoryUse]:
    """Return the memory of the optimizers that also work without a first moment."""
    memory = {
        "Adapprox, rank 1": adapprox(shapes, 1, first, width=width, state=state),
        "Adapprox, largest rank": adapprox(shapes, None, first, width=width, state=state),
        "Adafactor": adafactor(shapes, first, width=width, state=state),
    }
    return memory if first else {f"{name}, β₁ = 0": own for name, own in memory.items()}


def _memory_rows(ways: Mapping[str, MemoryUse]) -> pd.DataFrame:
    rows = [(method, part, getattr(memory, part), "computed") for method, memory in ways.items() for part in PARTS]
    return pd.DataFrame(rows, columns=["method", "part", "bytes", "source"])


def _match_targets(shapes: Shapes, targets: str | Sequence[str]) -> list[Shape]:
    """Return the shapes of the matrices that the targets select."""
    matrices = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    rows = [(module, *parse(module), *shape, "") for module, shape in matrices.items()]
    columns = ["module", "stack", "layer", "role", "out_features", "in_features", "tied"]
    description = pd.DataFrame(rows, columns=columns).astype({"layer": "Int16"})
    return [matrices[module] for module in match(description, targets)]


def _adamw(numbers: int, trained: Iterable[Shape], width: int, state: int) -> MemoryUse:
    trained = list(trained)
    each = count(trained)
    return MemoryUse(width * numbers, width * each, 2 * state * each + _COUNT * len(trained))


def _count_means(shape: Shape, pairs: int = 1) -> int:
    """Count the entries of ``pairs`` pairs of row and column means per matrix; a vector is stored once, as it is."""
    return pairs * math.prod(shape[:-2]) * sum(shape[-2:]) if len(shape) > 1 else math.prod(shape)


def _factored_memory(
    shapes: Shapes, second: Callable[[str, Shape], int], first: bool, width: int, state: int
) -> MemoryUse:
    """Return the memory if all parameters train; ``second`` counts the entries stored for a second moment."""
    numbers = size(shapes)
    kept = first * numbers + sum(second(name, shape) for name, shape in shapes.items())
    return MemoryUse(width * numbers, width * numbers, state * kept)


if not TYPE_CHECKING:  # type checkers should not see the old names
    __getattr__ = old_names(__name__, {"visited": "expect_visited_blocks"})
