"""PEFT's DoRA folders, read as files.

Beside the factors of LoRA lies ``lora_magnitude_vector`` (out,), the norms of the rows of the whole weight:
W = m * V / |V| with V = W_0 + scale * B @ A, row by row. So what changed is known with the base alone; without it, the
update is that of the direction, scale * B @ A.

Source: Liu et al. (arXiv 2402.09353), equation 5, as PEFT has it: norms are those of rows of (out, in).
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
from lorascope.runs.formats.peft_lora import AdapterFiles, LoraSettings, lora_factors, lora_part
from lorascope.runs.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.formats.stored_update import StoredLoRA, StoredTensor
from lorascope.updates.low_rank import Dense, LowRank


@dataclass(frozen=True)
class DoraPart(StoredLoRA):
    """The update of one module.

    Parameters
    ----------
    magnitude : Factor
        (out,).
    module : str
        Its name, by which the base has it.
    base : Pretrained or None
        Without it the update is that of the direction alone.
    """

    magnitude: StoredTensor
    module: str
    base: PretrainedWeights | None

    @property
    def has_thin_factors(self) -> bool:
        """The direction's update has thin factors, the whole one none."""
        return self.base is None

    @property
    def size(self) -> int:
        """Number of stored values."""
        return super().size + self.shape[0]

    def factors(self) -> dict[str, Any]:
        """Read the factors and the magnitude."""
        return super().factors() | {"magnitude": self.magnitude.read().reshape(-1)}

    def update(self) -> LowRank | Dense:
        """Of the direction; with the base, all that changed."""
        direction = super().update()
        if self.base is None:
            return direction
        W0 = self.base.weight(self.module, self.shape, self.transposed)
        V = direction.dense() + W0
        # A row without any weight has no direction, and PEFT divides by zero there, too.
        V *= self.magnitude.read().reshape(-1, 1) / np.linalg.norm(V, axis=1, keepdims=True)
        return Dense(V - W0)


def read_dora(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """The modules of an opened folder.

    Raises
    ------
    ValueError
        A factor is missing, or configuration and weights do not fit together.
    """
    found, others = lora_factors(path, files, ("A", "B", "magnitude_vector"))
    settings, parts = LoraSettings(path, config), {}
    for module, factors in found.items():
        plain = lora_part(path, module, factors, settings)
        magnitude, outer = factors["magnitude_vector"], factors["B"].shape[0]
        if math.prod(magnitude.shape) != outer:
            raise ValueError(
                f"{printable(path)}: lora_magnitude_vector of {printable(module)} must hold {outer} values, one per "
                f"output, got the shape {magnitude.shape}"
            )
        held = base if base is not None and base.has_weight(module) else None
        parts[module] = DoraPart(*plain, magnitude, module, held)
    return AdapterFiles(path, dict(config), parts, others, files, "DoRA")
