"""Reader of HydraLoRA folders in the layout of the authors' code.

They are PEFT LoRA folders with other tensor names: each module has ``lora_A.weight`` (rank, in), ``lora_route.weight``
(heads, in) and ``lora_B0.weight`` to ``lora_B<heads - 1>.weight`` (out, rank). Gate weights are not stored, so updates
are evaluated at uniform gate weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.printable import printable
from lorascope.files.typed_json import to_typed, unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import CONFIG, LoraConfig, peft_kind
from lorascope.formats.peft_factors import Factors, group_factors
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA, StoredTensor

# The router, and the first expert.
_HEAD = re.compile(r"\.lora_(?:route|B0)\.")
_FACTOR = re.compile(r"(?s)(?P<module>.+)\.lora_(?P<factor>A|B\d+|route)\.weight")


def has_heads(names: Collection[str]) -> bool:
    """Return whether a PEFT LoRA folder has the tensor names of a HydraLoRA."""
    return any(map(_HEAD.search, names))


@dataclass(frozen=True)
class HydraPart(StoredLoRA):
    """Stored HydraLoRA update: experts, each (out, rank), and router (experts, in); ``B`` is the first expert."""

    heads: tuple[StoredTensor, ...]
    router: StoredTensor

    @property
    def exact(self) -> bool:
        """Return whether the update is independent of the input: only if there is a single expert."""
        return len(self.heads) == 1

    @property
    def size(self) -> int:
        """Number of stored values, including the router."""
        return super().size + sum(math.prod(head.shape) for head in self.heads[1:])

    def factors(self) -> dict[str, Any]:
        """Load A, the experts and the router, and add uniform gate weights."""
        B = np.stack([head.read() for head in self.heads])
        # At least float32: in half precision the gates do not sum to 1, and the experts would be summed in it.
        gates = np.full(len(B), 1 / len(B), np.promote_types(B.dtype, np.float32))
        return {"A": self.A.read(), "B": B, "router": self.router.read(), "gates": gates}


@reads(
    lambda config, names: peft_kind(config) in ("LORA", "") and not config.get("use_dora") and has_heads(names),
    "HydraLoRA, in the layout of its authors",
)
def read_hydra(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a HydraLoRA folder in the layout of its authors."""
    module_factors, other_names = group_factors(files, _FACTOR)
    if not module_factors:
        raise unreadable(path, "its experts have no module name")
    settings = to_typed(config, LoraConfig, path / CONFIG)
    updates = {module: _hydra_part(path, module, factors, settings) for module, factors in module_factors.items()}
    return AdapterFiles(path, dict(config), updates, other_names, files, "HydraLoRA")


def _hydra_part(path: Path, module: str, factors: Factors, config: LoraConfig) -> HydraPart:
    name, rank = printable(module), config.r
    # Count the factors, because a number in a name may be arbitrarily large.
    count = max(len(factors.keys() - {"A", "route"}), 1)
    expected_names = ["A", "route", *(f"B{number}" for number in range(count))]
    for factor in expected_names:
        if factor not in factors:
            raise AdapterFault("incomplete", path, f"{name} has no lora_{factor}")
    A, router, *heads = map(factors.__getitem__, expected_names)
    if router.shape[0] != count:
        reason = f"router of {name} must have {count} rows, one per expert, got {router.shape[0]}"
        raise AdapterFault("shape", path, reason)
    ranks = {A.shape[0], *(head.shape[1] for head in heads)}
    if ranks != {rank}:
        listing = " and ".join(map(str, sorted(ranks)))
        raise AdapterFault("rank", path, f"factors of {name} must have rank {rank} ({CONFIG}), got {listing}")
    if router.shape[1] != A.shape[1] or len({head.shape for head in heads}) > 1:
        raise AdapterFault("shape", path, f"{name} must have experts of one shape, and a router as wide as its lora_A")
    return HydraPart(heads[0], A, config.lora_alpha / rank, False, tuple(heads), router)
