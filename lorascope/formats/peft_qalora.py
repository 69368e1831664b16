"""Reader of PEFT QALoRA folders, for quantized bases.

The input of a module is averaged over groups of ``qalora_group_size`` g neighbors and multiplied by their number, in /
g. A is stored as (rank, in / g). The update is the usual product, with A (rank, in) that repeats every column g times,
times in / g^2. PEFT applies it only to GPTQ bases and does not merge it.

Source: Xu et al. (arXiv 2309.14717), as in PEFT 0.21.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.typed_json import Positive, to_typed
from lorascope.formats.peft_config import CONFIG, peft_kind
from lorascope.formats.peft_factors import require_factor_shape
from lorascope.formats.peft_lora import RanksAndScales, check_rank, lora_factors
from lorascope.formats.peft_modules import complete_lora, stacked_base
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA


class GroupConfig(msgspec.Struct, frozen=True):
    """Setting used from PEFT's QALoRA configuration in addition to those of LoRA, with its default."""

    qalora_group_size: Positive = 16


@dataclass(frozen=True)
class GroupedPart(StoredLoRA):
    """Stored update of PEFT's QALoRA, with one column of ``A`` per group of inputs."""

    group: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1] * self.group

    def factors(self) -> dict[str, Any]:
        """Load the factors, with A (rank, in)."""
        return {"A": np.repeat(self.A.read(), self.group, axis=1), "B": self.B.read()}


@reads(lambda config, names: peft_kind(config) == "QALoRA", "QALoRA (PEFT)")
def read_qalora(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT QALoRA folder."""
    module_factors, other_names = lora_factors(path, files, ("A", "B"))
    settings = RanksAndScales(path / CONFIG, config)
    group = to_typed(config, GroupConfig, path / CONFIG).qalora_group_size
    updates = {}
    for module, factors in module_factors.items():
        check_rank(path, module, factors, settings.rank(module))
        A, B = factors["A"], factors["B"]
        # The loaded A has one column per input.
        require_factor_shape(path, f"lora_A of {module}", (A.shape[0], A.shape[1] * group))
        # A has in / g columns: PEFT multiplies the means of g inputs by this number.
        updates[module] = GroupedPart(B, A, settings.scale(module) * A.shape[1] / group, False, group)
    base = stacked_base(path, config, module_factors, base)
    return complete_lora(AdapterFiles(path, dict(config), updates, other_names, files, "QALoRA", base=base))
