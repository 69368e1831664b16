"""PEFT's AdaLoRA folders, read as files.

Below a module lie ``lora_A`` (rank, in), ``lora_E`` (rank, 1) and ``lora_B`` (out, rank). Components that the allocator
took are zero in E and do not count as rank; of modules in ``rank_pattern`` only the others are stored. In a new adapter
all of E is zero, and all components count. PEFT divides alpha by the initial rank plus 1e-5, whatever the rank is now.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Finite, Positive, to_typed
from lorascope.runs.formats.peft_lora import CONFIG, AdapterFiles, check_rank, is_transposed, lora_factors
from lorascope.runs.formats.stored_update import StoredLoRA, StoredTensor
from lorascope.updates.low_rank import Dense, LowRank


@dataclass(frozen=True)
class AdaLoraConfig:
    """What counts here of ``adapter_config.json``, with PEFT's defaults; ``rank_pattern`` says what is kept."""

    init_r: Positive = 12
    lora_alpha: Finite = 8
    rank_pattern: dict[str, list[bool]] | None = None
    fan_in_fan_out: bool | None = None


@dataclass(frozen=True)
class AdaPart(StoredLoRA):
    """The update of one module: scale * B @ diag(E) @ A.

    Parameters
    ----------
    E : Factor
        (rank, 1).
    used : int
        Number of components that are not masked.
    """

    E: StoredTensor
    used: int

    @property
    def rank(self) -> int:
        """Number of components that are not masked."""
        return self.used

    @property
    def size(self) -> int:
        """Number of stored values."""
        return super().size + self.E.shape[0]

    def factors(self) -> dict[str, Any]:
        """Read the factors; E as the diagonal that it is."""
        return super().factors() | {"diagonal": self.E.read().reshape(-1)}

    def update(self) -> LowRank | Dense:
        """Read the factors."""
        held = self.factors()
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite entry shows as an infinite norm
            B = held["B"] * held["diagonal"]
        return LowRank(B, held["A"], self.scale)


def read_adalora(path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...]) -> AdapterFiles:
    """The modules of an opened folder.

    Raises
    ------
    ValueError
        A factor is missing, or configuration and weights do not fit together.
    """
    settings = to_typed(config, AdaLoraConfig, path / CONFIG)
    found, others = lora_factors(path, files, ("A", "B", "E"))
    scale = settings.lora_alpha / (settings.init_r + 1e-5)
    kept = {name.removesuffix(".lora_E"): sum(mask) for name, mask in (settings.rank_pattern or {}).items()}
    for module, factors in found.items():
        check_rank(path, module, factors, kept.get(module, settings.init_r))
        rank, shape = factors["A"].shape[0], factors["E"].shape
        if math.prod(shape) != rank:
            raise ValueError(
                f"{printable(path)}: lora_E of {printable(module)} must hold {rank} values, its rank, "
                f"got the shape {shape}"
            )
    used = {module: int(np.count_nonzero(factors["E"].read())) for module, factors in found.items()}
    if not any(used.values()):
        used = {module: factors["A"].shape[0] for module, factors in found.items()}
    parts = {}
    for module, factors in found.items():
        A, B, E = (factors[name] for name in "ABE")
        parts[module] = AdaPart(B, A, scale, is_transposed(A, settings.fan_in_fan_out), E, used[module])
    return AdapterFiles(path, dict(config), parts, others, files, "AdaLoRA")
