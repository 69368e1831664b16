"""Products of two factors in PEFT's form: configuration, and the factors of every module.

Components with an exactly zero diagonal, which an allocator has masked, are omitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.export.exporters import RunExporter
from lorascope.runs.lora_config import exact_products, peft_keywords
from lorascope.runs.result import Result
from lorascope.updates import LowRank


class LoraExporter(RunExporter):
    """Exporter of products of two factors to PEFT, as LoRA."""

    kind = "LoRA"

    def updates(self, run: Result, state: str) -> dict[str, Any]:
        """Return the update of every module with at least one component in use; it must be a product of two factors."""
        ranks, updates = run.ranks(state), exact_products(run, run.updates(state=state))
        cannot = f"cannot export {run.reference} as LoRA"
        if not ranks:
            raise ValueError(f"{cannot}: it trained the weights themselves")
        for name in ranks:
            if name not in updates:
                raise ValueError(f"{cannot}: the update of {name} is not a product B A")
        factors = run.factors(state=state)
        used = {}
        for name, update in updates.items():
            product = drop_unused(update, factors[name].get("diagonal"))
            if product.rank:
                used[name] = product
        return used

    def keywords(self, run: Result, updates: Mapping[str, Any]) -> dict[str, Any]:
        ranks = {name: update.rank for name, update in updates.items()}
        return {"peft_type": "LORA", **peft_keywords(run, ranks, updates), "lora_dropout": 0.0}

    def tensors(self, module: str, update: Any, host: str) -> Iterator[tuple[str, np.ndarray]]:
        pattern = "lora_embedding_{}" if host == "Embedding" else "lora_{}.weight"
        for key, factor in (("A", update.A), ("B", update.B)):
            yield f"{module}.{pattern.format(key)}", factor


def drop_unused(update: LowRank, diagonal: Float[np.ndarray, "rank"] | None) -> LowRank:
    """Remove the components of a PEFT LoRA whose diagonal is exactly zero; None means a diagonal of ones."""
    if diagonal is None:
        return update
    used = diagonal != 0
    return LowRank(update.B[:, used], update.A[used], update.scale)
