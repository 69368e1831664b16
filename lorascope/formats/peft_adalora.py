"""Reader of PEFT AdaLoRA folders.

Each module has ``lora_A`` (rank, in), ``lora_E`` (rank, 1) and ``lora_B`` (out, rank). Components that the allocator
masked are zero in E and do not count toward the rank; modules in ``rank_pattern`` store only the others. In a new
adapter, E is all zero and all components count. PEFT divides alpha by the initial rank plus 1e-5, regardless of the
current rank. An alpha of 0 or less counts as the initial rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.printable import printable
from lorascope.files.typed_json import Finite, Positive, to_typed
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import CONFIG, peft_kind
from lorascope.formats.peft_lora import check_rank, is_transposed, lora_factors
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA, StoredTensor


class AdaLoraConfig(msgspec.Struct, frozen=True):
    """Settings used from PEFT's AdaLoRA configuration, with its defaults; ``rank_pattern`` masks components."""

    init_r: Positive = 12
    lora_alpha: Finite = 8
    rank_pattern: dict[str, list[bool]] | None = None
    fan_in_fan_out: bool | None = None


@dataclass(frozen=True)
class AdaPart(StoredLoRA):
    """Stored update of PEFT's AdaLoRA: scale * B @ diag(E) @ A with E (rank, 1); ``used`` components are not masked."""

    E: StoredTensor
    used: int

    @property
    def rank(self) -> int:
        """Number of components that are not masked."""
        return self.used

    def factors(self) -> dict[str, Any]:
        """Load the factors, with E as ``diagonal`` (rank,)."""
        return super().factors() | {"diagonal": self.E.read().reshape(-1)}


@reads(lambda config, names: peft_kind(config) == "ADALORA", "AdaLoRA (PEFT)")
def read_adalora(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT AdaLoRA folder."""
    settings = to_typed(config, AdaLoraConfig, path / CONFIG)
    module_factors, other_names = lora_factors(path, files, ("A", "B", "E"))
    alpha = settings.lora_alpha if settings.lora_alpha > 0 else settings.init_r
    scale = alpha / (settings.init_r + 1e-5)
    masks = settings.rank_pattern or {}
    component_counts = {name.removesuffix(".lora_E"): sum(mask) for name, mask in masks.items()}
    updates = {}
    for module, factors in module_factors.items():
        check_rank(path, module, factors, component_counts.get(module, settings.init_r))
        A, B, E = factors["A"], factors["B"], factors["E"]
        if math.prod(E.shape) != A.shape[0]:
            reason = f"lora_E of {printable(module)} must have {A.shape[0]} values, got shape {E.shape}"
            raise AdapterFault("shape", path, reason)
        transposed = is_transposed(A, settings.fan_in_fan_out)
        # Only the values of E show which components are masked.
        updates[module] = AdaPart(B, A, scale, transposed, E, int(np.count_nonzero(E.read())))
    if not any(update.used for update in updates.values()):  # a new adapter, whose E is zero
        updates = {module: replace(update, used=update.A.shape[0]) for module, update in updates.items()}
    return AdapterFiles(path, dict(config), updates, other_names, files, "AdaLoRA")
