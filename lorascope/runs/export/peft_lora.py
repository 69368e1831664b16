"""Updates of low rank in PEFT's form: the configuration of a LoRA, and both factors of every module.

Components with an exactly zero diagonal, which is how an allocator masks them, are in neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lorascope.runs.run import Run
from lorascope.runs.summary import exact_products, peft_keywords
from lorascope.updates.low_rank import LowRank


def updates_of(run: Run, state: str) -> dict[str, LowRank]:
    """The update of every module with a component in use.

    Raises
    ------
    ValueError
        One is no product of two factors.
    """
    ranks, updates = run.ranks(state), exact_products(run, run.updates(state=state))
    unfit = next((name for name in ranks if name not in updates), None)
    if not ranks or unfit is not None:
        where = f"that of {unfit} is" if unfit else "it changed the weights themselves, which is"
        raise ValueError(f"run {run.id} ({run.label}) has no low-rank updates to export: {where} not a product B A")
    factors = run.factors(state=state)
    found = {name: drop_unused(update, factors[name].get("diagonal")) for name, update in updates.items()}
    return {name: update for name, update in found.items() if update.rank}


def drop_unused(update: LowRank, diagonal: Float[np.ndarray, "rank"] | None) -> LowRank:
    """The update without the components whose diagonal is exactly zero; None is a diagonal of ones."""
    if diagonal is None:
        return update
    used = diagonal != 0
    return LowRank(update.B[:, used], update.A[used], update.scale)


def keywords(run: Run, updates: Mapping[str, LowRank]) -> dict[str, Any]:
    """Entries of the configuration that are LoRA's."""
    ranks = {name: update.rank for name, update in updates.items()}
    return {"peft_type": "LORA", **peft_keywords(run, ranks, updates), "lora_dropout": 0.0}


def tensors(module: str, update: LowRank, host: str) -> Iterator[tuple[str, np.ndarray]]:
    """Both factors, under PEFT's names."""
    pattern = "lora_embedding_{}" if host == "Embedding" else "lora_{}.weight"
    for key, factor in (("A", update.A), ("B", update.B)):
        yield f"{module}.{pattern.format(key)}", factor
