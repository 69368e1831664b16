"""Reader of PEFT SuperTuning folders.

Each module has ``supertuning_values`` (n,), the changes of n entries of its weight, and ``supertuning_indices`` (n,),
their places in the weight read row by row. The factors ``supertuning_lora_A`` (r, in) and ``supertuning_lora_B`` (out,
r) add lora_alpha / r B A. Shapes are read from the base model.

Source: as in PEFT (arXiv 2607.09287).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Finite, Positive, to_typed
from lorascope.formats.peft_factors import StoredFactors, check_indices, check_shapes, peft_factors
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, base_with_shapes, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense
from lorascope.updates.linalg import as_float64

_FACTORS = {"supertuning_lora_A": "r in", "supertuning_lora_B": "out r"}


class SupertuningConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults; without ``r`` there are no factors."""

    r: Positive | None = None
    lora_alpha: Finite | None = None


@reads(lambda config, names: peft_kind(config) == "SUPERTUNING", "SuperTuning (PEFT)", needs="base")
def read_supertuning(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened SuperTuning folder."""
    settings = to_typed(config, SupertuningConfig, path / CONFIG)
    names = "supertuning_values|supertuning_lora_A|supertuning_lora_B"
    found, others = peft_factors(path, files, names, "supertuning_indices")
    weights = base_with_shapes(path, config, base, "SuperTuning")
    rank = settings.r or 0
    scale = (settings.lora_alpha or rank) / rank if rank else 1.0
    shapes = {"supertuning_values": "n", "supertuning_indices": "n"} | (_FACTORS if rank else {})
    parts = {}
    for module, factors in found.items():
        sides = weights.shape(module)
        known = {"r": rank, "out": sides[0], "in": sides[1]} if rank else {}
        check_shapes(path, module, factors, shapes, **known)
        check_indices(path, module, factors, "supertuning_indices", sides[0] * sides[1])
        build = partial(_add_sparse, sides, scale)
        parts[module] = StoredFactors(factors, sides, min(sides), build, thin=False)
    return AdapterFiles(path, dict(config), parts, others, files, "SuperTuning", named_base(config) is None)


def _add_sparse(sides: tuple[int, int], scale: float, arrays: dict[str, np.ndarray]) -> Dense:
    matrix = np.zeros(sides)
    places = arrays["supertuning_indices"].astype(np.int64)
    np.add.at(matrix.reshape(-1), places, as_float64(arrays["supertuning_values"]))
    if "supertuning_lora_B" in arrays:
        A, B = (as_float64(arrays[name]) for name in _FACTORS)
        matrix += scale * (B @ A)
    return Dense(matrix)
