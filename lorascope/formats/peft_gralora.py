"""Reader of PEFT GraLoRA folders.

The weight is a grid of k x k blocks, each with an own update of rank q = r / k. ``gralora_A`` (k, in / k, r) and
``gralora_B`` (k, r, out / k) contain the factors: out-block c and in-block a have A[a][:, c q:(c + 1) q] and
B[c][a q:(a + 1) q]. ``gralora_A_general`` and ``gralora_B_general`` of rank ``hybrid_r`` add a common product. All are
multiplied by alpha / (r + hybrid_r). Together they are one product of rank k r + hybrid_r.

Source: Jung et al. (arXiv 2505.20355), equation 6, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Count, Finite, Positive, to_typed, unreadable
from lorascope.formats.peft_factors import StoredFactors, check_shapes, peft_factors
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense, LowRank, Update
from lorascope.updates.linalg import as_float64

_GRID = {"gralora_A": "k inner r", "gralora_B": "k r outer"}
_GENERAL = {"gralora_A_general": "hybrid in", "gralora_B_general": "out hybrid"}


class GraloraConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    r: Positive = 32
    hybrid_r: Count = 0
    alpha: Finite = 64
    gralora_k: Positive = 2
    fan_in_fan_out: bool | None = None


@reads(lambda config, names: peft_kind(config) == "GRALORA", "GraLoRA (PEFT)")
def read_gralora(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened GraLoRA folder."""
    settings = to_typed(config, GraloraConfig, path / CONFIG)
    k, rank, hybrid = settings.gralora_k, settings.r, settings.hybrid_r
    if rank % k:
        raise unreadable(path / CONFIG, f"r must be a multiple of gralora_k, got {rank} and {k}")
    found, others = peft_factors(path, files, "gralora_A|gralora_B|gralora_A_general|gralora_B_general")
    scale = settings.alpha / (rank + hybrid)
    parts = {}
    for module, factors in found.items():
        sizes = check_shapes(path, module, factors, _GRID, k=k, r=rank)
        sides = k * sizes["outer"], k * sizes["inner"]
        if hybrid:
            check_shapes(path, module, factors, _GENERAL, hybrid=hybrid, out=sides[0], **{"in": sides[1]})
        components = min(k * rank + hybrid, *sides)
        thin, transposed = components < min(sides), bool(settings.fan_in_fan_out)
        build = partial(_grid_product, scale, bool(hybrid))
        parts[module] = StoredFactors(factors, sides, components, build, scale, transposed, thin)
    return AdapterFiles(path, dict(config), parts, others, files, "GraLoRA")


def _grid_product(scale: float, hybrid: bool, arrays: dict[str, np.ndarray]) -> Update:
    grid_A, grid_B = as_float64(arrays["gralora_A"]), as_float64(arrays["gralora_B"])
    k, inner, rank = grid_A.shape
    outer, q = grid_B.shape[2], rank // k
    A, B = np.zeros((k, k, q, k, inner)), np.zeros((k, outer, k, k, q))
    for block in range(k):
        A[:, block, :, block] = grid_A[block].T.reshape(k, q, inner)
        B[block, :, block] = grid_B[block].T.reshape(outer, k, q)
    A, B = A.reshape(k * rank, k * inner), B.reshape(k * outer, k * rank)
    if hybrid:
        A = np.vstack([A, as_float64(arrays["gralora_A_general"])])
        B = np.hstack([B, as_float64(arrays["gralora_B_general"])])
    product = LowRank(B, A, scale)
    return product if product.rank < min(product.shape) else Dense(product.dense())
