"""Reader of PEFT Uni-LoRA folders.

The entries of A (r, in) and B (out, r) are values of one vector that all modules share, ``unilora_theta_d``, at
``unilora_indices_A`` and ``unilora_indices_B``, times ``unilora_scales_A`` and ``unilora_scales_B``. The update is B A.
Without ``save_indices`` the folder has only the vector, and PEFT merges it.

Source: Li et al. (arXiv 2506.00799), as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Positive, to_typed
from lorascope.formats.peft_factors import StoredFactors, check_indices, check_shapes, peft_factors, shared_factor
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.peft_merge import read_merged
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles, StoredTensor
from lorascope.updates import LowRank
from lorascope.updates.linalg import as_float64

_SHAPES = {
    "unilora_indices_A": "r in",
    "unilora_indices_B": "out r",
    "unilora_scales_A": "r in",
    "unilora_scales_B": "out r",
}
_VECTOR = "unilora_theta_d"


class UniLoraConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    r: Positive = 4
    save_indices: bool = False
    fan_in_fan_out: bool | None = None


@reads(lambda config, names: peft_kind(config) == "UNILORA", "Uni-LoRA (PEFT)")
def read_unilora(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened Uni-LoRA folder."""
    settings = to_typed(config, UniLoraConfig, path / CONFIG)
    vector = shared_factor(path, files, _VECTOR)
    if not settings.save_indices:
        return read_merged(path, config, files, base)
    found, others = peft_factors(
        path, files, "unilora_scales_A|unilora_scales_B", "unilora_indices_A|unilora_indices_B"
    )
    parts = {}
    for module, factors in found.items():
        sizes = check_shapes(path, module, factors, _SHAPES, r=settings.r)
        for side in "AB":
            check_indices(path, module, factors, f"unilora_indices_{side}", math.prod(vector.shape))
        build, transposed = partial(_gathered_product, vector), bool(settings.fan_in_fan_out)
        sides, scales = (sizes["out"], sizes["in"]), frozenset({"unilora_scales_A", "unilora_scales_B"})
        parts[module] = StoredFactors(factors, sides, settings.r, build, transposed=transposed, frozen=scales)
    others = tuple(name for name in others if not name.endswith(_VECTOR))
    return AdapterFiles(path, dict(config), parts, others, files, "Uni-LoRA", shared_size=math.prod(vector.shape))


def _gathered_product(vector: StoredTensor, arrays: dict[str, np.ndarray]) -> LowRank:
    theta = as_float64(vector.read()).reshape(-1)
    A, B = (
        theta[arrays[f"unilora_indices_{side}"].astype(np.int64)] * as_float64(arrays[f"unilora_scales_{side}"])
        for side in "AB"
    )
    return LowRank(B, A)
