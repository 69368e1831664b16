"""Reader of adapters in the layout of loralib.

Each module has ``lora_A`` and ``lora_B``. The layout has no configuration, so alpha and rank are not stored; an
``adapter_config.json`` can be added next to the weights. A ``MergedLinear`` adapts several outputs of one weight, such
as query, key and value: A (n * rank, in) and B (n * rows, rank) contain one block for each of the n enabled outputs.
The setting ``enable_lora`` selects the enabled outputs, as in early versions of PEFT. Without it, the shape omits the
other outputs, whose update is zero.

Source: microsoft/LoRA, ``loralib/layers.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from lorascope.files.printable import printable
from lorascope.files.typed_json import Finite, Positive, to_typed
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.hydralora import has_heads
from lorascope.formats.image_keys import is_image_adapter
from lorascope.formats.peft_config import CONFIG, peft_kind
from lorascope.formats.peft_lora import is_transposed, lora_factors
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA

# Query, key and value are three outputs. Each one takes memory for its block, even if it is disabled.
MAX_OUTPUTS = 64


class LoralibConfig(msgspec.Struct, frozen=True):
    """Settings used from an ``adapter_config.json`` next to loralib's weights; without ``r``, lora_B has the rank."""

    r: Positive | None = None
    lora_alpha: Finite = 1
    enable_lora: Annotated[list[bool], msgspec.Meta(max_length=MAX_OUTPUTS)] | None = None
    fan_in_fan_out: bool | None = None


@dataclass(frozen=True)
class LoralibPart(StoredLoRA):
    """Stored update of loralib's ``MergedLinear``: scale * blocks(B) @ A, with one block per enabled output."""

    enabled: tuple[bool, ...]

    @property
    def shape(self) -> tuple[int, int]:
        outer, inner = super().shape
        return outer // sum(self.enabled) * len(self.enabled), inner

    def factors(self) -> dict[str, Any]:
        """Load A, and B with the block of every output at its rows and components."""
        A, blocks = self.A.read(), np.split(self.B.read(), sum(self.enabled))
        height, rank = blocks[0].shape
        B = np.zeros((self.shape[0], len(A)), blocks[0].dtype)
        for number, output in enumerate(np.flatnonzero(self.enabled)):
            B[output * height : (output + 1) * height, number * rank : (number + 1) * rank] = blocks[number]
        return {"A": A, "B": B}


def _is_merged(config: Mapping[str, Any], names: Collection[str]) -> bool:
    plain = not config and any(".lora_" in name for name in names)
    merged = plain or (peft_kind(config) == "LORA" and "enable_lora" in config)
    return merged and not has_heads(names) and not is_image_adapter(config, names)


@reads(_is_merged, "LoRA of loralib")
def read_loralib(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of an adapter of loralib; without a configuration, the scale is 1."""
    module_factors, other_names = lora_factors(path, files, ("A", "B"))
    settings, source = to_typed(config, LoralibConfig, path / CONFIG), CONFIG if config else "from lora_B"
    updates = {}
    for module, factors in module_factors.items():
        A, B = factors["A"], factors["B"]
        rank = settings.r or B.shape[1]
        # Without the setting, the shape of A shows how many outputs there are.
        enabled = settings.enable_lora or [True] * min(A.shape[0] // max(rank, 1), MAX_OUTPUTS)
        count = sum(enabled)
        if not count or (A.shape[0], B.shape[1]) != (rank * count, rank) or B.shape[0] % count:
            must = f"factors of {printable(module)} must have rank {rank} and {count} outputs ({source})"
            raise AdapterFault("shape", path, f"{must}, got lora_A {A.shape} and lora_B {B.shape}")
        scale = settings.lora_alpha / rank if config else 1.0
        updates[module] = LoralibPart(B, A, scale, is_transposed(A, settings.fan_in_fan_out), tuple(enabled))
    return AdapterFiles(path, dict(config), updates, other_names, files)
