"""Reader of PEFT HiRA folders.

Each module has ``hira_A`` (r, in) and ``hira_B`` (out, r), or for an embedding ``hira_embedding_A`` and
``hira_embedding_B``. The update W_0 * (B A), elementwise, has a high rank and requires the base model.

Source: Huang et al. (ICLR 2025, "HiRA"), equation 2, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Positive, to_typed
from lorascope.formats.peft_factors import StoredFactors, check_fit, check_shapes, from_base, peft_factors, require_base
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.schema.name_patterns import per_module
from lorascope.updates import Dense
from lorascope.updates.linalg import as_float64


class HiraConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    r: Positive = 32
    rank_pattern: dict[str, Positive] | None = None
    fan_in_fan_out: bool | None = None


@reads(lambda config, names: peft_kind(config) == "HIRA", "HiRA (PEFT)", needs="base")
def read_hira(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened HiRA folder."""
    settings = to_typed(config, HiraConfig, path / CONFIG)
    weights = require_base(path, config, base, "HiRA")
    rank_of = per_module(path / CONFIG, "rank_pattern", settings.r, settings.rank_pattern)
    found, others = peft_factors(path, files, "hira_A|hira_B|hira_embedding_A|hira_embedding_B")
    parts = {}
    for module, factors in found.items():
        prefix = "hira_embedding_" if any("embedding" in name for name in factors) else "hira_"
        check_shapes(path, module, factors, {f"{prefix}A": "r *", f"{prefix}B": "out r *"}, r=rank_of(module))
        A, B = factors[f"{prefix}A"], factors[f"{prefix}B"]
        transposed = bool(settings.fan_in_fan_out) or prefix == "hira_embedding_"
        sides = weights.shape(module, transposed)
        check_fit(path, module, (B.shape[0], A.shape[1]), sides)
        build = from_base(weights, module, sides, partial(_product_change, prefix), transposed)
        parts[module] = StoredFactors(factors, sides, min(sides), build, transposed=transposed, thin=False)
    return AdapterFiles(path, dict(config), parts, others, files, "HiRA", named_base(config) is None)


def _product_change(prefix: str, arrays: dict[str, np.ndarray], W0: np.ndarray) -> Dense:
    A, B = (as_float64(arrays[prefix + name]).reshape(len(arrays[prefix + name]), -1) for name in "AB")
    return Dense(W0 * (B @ A))
