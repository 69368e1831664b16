"""What a step holds by arithmetic alone: bytes of parameters, gradients and optimizer state for every way to train.

A model is its shapes, as ``model_shapes`` has them. With N numbers in all, T of them trained, and over the matrices, m
x n, that an optimizer factors (v the numbers of the others, kept dense):

==============  ====================================================================
AdamW           2 T, and a count of steps for every tensor, as torch keeps it
LoRA            AdamW of T = sum of rank (m + n)
LISA            AdamW of T = what lies outside the blocks, and the active blocks
Adapprox        N (first moment) + sum of k (m + n) + v
Adafactor       N (first moment) + sum of (m + n) + v
CAME            N + 2 sum of (m + n) + v
==============  ====================================================================

Of a tensor of more dimensions Adapprox makes one matrix, its first side against all others; Adafactor and CAME see a
stack of matrices, of its last two sides.

Activations are not among it: they depend on batch, text and kernels, and are measured or not known.

Source: LISA (arXiv 2403.17919), section 3.2; Adapprox (arXiv 2403.14958), whose published savings these formulas give
to the printed digit with k from 1 to a quarter of the smaller side; Adafactor (arXiv 1804.04235); CAME (arXiv
2307.02047).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lorascope.analysis.model_shapes import GPT2, LLAMA2, Shape, Shapes, blocks, count, gpt2, llama, shapes_of, size
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
    "full",
    "gpt2",
    "lisa",
    "llama",
    "lora",
    "optimizers",
    "shapes_of",
    "size",
    "table",
    "visited",
]

PARTS = ("parameters", "gradients", "optimizer")
POLICIES = ("keep", "reset", "reset_all")
RANK_SHARE = 0.25  # Adapprox: largest rank against the smaller side of a matrix
_COUNT = 4  # bytes of torch's count of steps


@dataclass(frozen=True)
class MemoryUse:
    """Bytes alive at the optimizer step.

    Parameters
    ----------
    parameters, gradients, optimizer : int
    """

    parameters: int
    gradients: int
    optimizer: int


def full(shapes: Shapes, *, width: int = 4, state: int = 4) -> MemoryUse:
    """AdamW on everything.

    Parameters
    ----------
    shapes : mapping parameter name -> shape
    width : int
        Bytes of a weight, and of its gradient.
    state : int
        Bytes of a number of the optimizer.
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
    """AdamW on two factors of every target.

    Parameters
    ----------
    shapes, width, state
        As for ``full``.
    rank : int
    targets : str or sequence of str
        As for the method; see ``names.match``.
    beside : collection of str
        Parameters that train themselves, such as the head of a classifier.
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
    """AdamW on what lies outside the blocks, and on a few blocks.

    Parameters
    ----------
    shapes, width, state
        As for ``full``.
    active : int, optional
        Blocks that train at a time, two by default or all of a model that has fewer; where blocks differ, the largest,
        so that no draw holds more.
    policy : {"keep", "reset", "reset_all"}
        Optimizer state when blocks leave: kept, dropped, or dropped of everything. At a step's end the last two hold
        the same.
    visited : int, optional
        Blocks that were active until now, which count where state is kept; all by default.

    Raises
    ------
    ValueError
        The policy is unknown, or there are not so many blocks.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is unknown: {', '.join(POLICIES)}")
    parts = sorted(blocks(shapes).values(), key=size, reverse=True)
    active = _blocks_at_a_time(active, len(parts))
    if not 0 <= active <= len(parts):
        raise ValueError(f"active: {active} blocks of {len(parts)} cannot train: give 0 to {len(parts)}")
    with_state = (len(parts) if visited is None else visited) if policy == "keep" else active
    if not active <= with_state <= len(parts):
        raise ValueError(
            f"visited: {with_state} blocks, {active} of them active, cannot be: give {active} to {len(parts)}"
        )
    inside = {name for part in parts for name in part}
    outside = [shape for name, shape in shapes.items() if name not in inside]
    now, stated = ([*outside, *(s for part in parts[:n] for s in part.values())] for n in (active, with_state))
    held = _adamw(size(shapes), stated, width, state)
    return MemoryUse(held.parameters, width * count(now), held.optimizer)


def _blocks_at_a_time(active: int | None, blocks: int) -> int:
    """LISA's gamma, as given or by default."""
    return min(2, blocks) if active is None else active


def visited(blocks: int, active: int, intervals: int) -> float:
    """How many different blocks LISA is expected to have trained after some draws: L (1 - (1 - gamma / L)^n)."""
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
    """Second moment in factors of rank k.

    Parameters
    ----------
    shapes, width, state
        As for ``full``.
    rank : int, mapping parameter name -> int, or None
        Ranks in force, no more of them than the smaller side; None takes the largest allowed, a quarter of it.
    first : bool
        Is there a first moment (beta_1 > 0)?
    min_dim : int or None
        A matrix whose smaller side is less keeps a dense second moment, with None every matrix.
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
    """Second moment as row and column means; arguments as for ``adapprox``."""
    return _factored_memory(shapes, lambda _, shape: _count_means(shape), first, width, state)


def came(shapes: Shapes, *, width: int = 4, state: int = 4) -> MemoryUse:
    """Adafactor with a second pair of means, of the instability; arguments as for ``full``."""
    return _factored_memory(shapes, lambda _, shape: _count_means(shape, 2), True, width, state)


def table(
    shapes: Shapes, rank: int = 128, active: int | None = None, *, width: int = 4, state: int = 4
) -> pd.DataFrame:
    """Every way to train one model, as the figure of memory takes it.

    Parameters
    ----------
    shapes, width, state
        As for ``full``.
    rank : int
        Of LoRA on all linear layers, embedding and head, as LISA's paper has it; one that is the embedding counts once.
    active : int, optional
        LISA's blocks, as for ``lisa``.

    Returns
    -------
    DataFrame
        ``method, part, bytes, source``, the source being "computed".
    """
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
    """Every optimizer of all weights, and those that can do without a first moment once more, with none.

    Parameters
    ----------
    shapes, width, state
        As for ``full``.

    Returns
    -------
    DataFrame
        As ``table`` gives it.
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
    """What can do with and without a first moment."""
    held = {
        "Adapprox, rank 1": adapprox(shapes, 1, first, width=width, state=state),
        "Adapprox, largest rank": adapprox(shapes, None, first, width=width, state=state),
        "Adafactor": adafactor(shapes, first, width=width, state=state),
    }
    return held if first else {f"{name}, β₁ = 0": own for name, own in held.items()}


def _memory_rows(ways: Mapping[str, MemoryUse]) -> pd.DataFrame:
    rows = [(method, part, getattr(held, part), "computed") for method, held in ways.items() for part in PARTS]
    return pd.DataFrame(rows, columns=["method", "part", "bytes", "source"])


def _match_targets(shapes: Shapes, targets: str | Sequence[str]) -> list[Shape]:
    """The matrices that targets name."""
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
    """Numbers of so many pairs of means by row and by column of each matrix; a vector is kept as it is, once."""
    return pairs * math.prod(shape[:-2]) * sum(shape[-2:]) if len(shape) > 1 else math.prod(shape)


def _factored_memory(
    shapes: Shapes, second: Callable[[str, Shape], int], first: bool, width: int, state: int
) -> MemoryUse:
    """All parameters train; ``second`` counts what is kept in place of a second moment."""
    numbers = size(shapes)
    kept = first * numbers + sum(second(name, shape) for name, shape in shapes.items())
    return MemoryUse(width * numbers, width * numbers, state * kept)
