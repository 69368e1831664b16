"""Reader of PEFT DeLoRA folders.

Each module has ``delora_A`` (r, in), ``delora_B`` (out, r), the bound ``delora_lambda`` (1,) and the column norms of
its base weight, ``delora_w_norm`` (in,). Components have norm lambda / r before their columns are multiplied by w_norm.

Source: Bini et al. (arXiv 2503.18225), equation 8, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Positive, to_typed
from lorascope.formats.peft_factors import StoredFactors, check_shapes, peft_factors
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.schema.name_patterns import per_module
from lorascope.updates import LowRank
from lorascope.updates.linalg import as_float64

_SHAPES = {"delora_A": "r in", "delora_B": "out r", "delora_lambda": "1", "delora_w_norm": "in"}


class DeloraConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    r: Positive = 8
    rank_pattern: dict[str, Positive] | None = None


@reads(lambda config, names: peft_kind(config) == "DELORA", "DeLoRA (PEFT)")
def read_delora(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened DeLoRA folder."""
    settings = to_typed(config, DeloraConfig, path / CONFIG)
    rank_of = per_module(path / CONFIG, "rank_pattern", settings.r, settings.rank_pattern)
    found, others = peft_factors(path, files, "|".join(_SHAPES))
    parts = {}
    for module, factors in found.items():
        sizes = check_shapes(path, module, factors, _SHAPES, r=rank_of(module))
        shape, frozen = (sizes["out"], sizes["in"]), frozenset({"delora_w_norm"})
        parts[module] = StoredFactors(factors, shape, sizes["r"], _bounded_product, frozen=frozen)
    return AdapterFiles(path, dict(config), parts, others, files, "DeLoRA")


def _bounded_product(arrays: dict[str, np.ndarray]) -> LowRank:
    A, B, bound, norms = (as_float64(arrays[name]) for name in _SHAPES)
    sizes = np.maximum(np.linalg.norm(A, axis=1), 1e-4) * np.maximum(np.linalg.norm(B, axis=0), 1e-4)
    return LowRank(B * (bound / len(A) / sizes), A * norms)
