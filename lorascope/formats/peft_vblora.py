"""Reader of PEFT VB-LoRA folders.

The rows of A (r, in) and the columns of B (out, r) consist of sub-vectors of length L, each a mix of k vectors of one
bank that all modules share, ``vblora_vector_bank`` (vectors, L). ``vblora_logits_A`` (r, in / L, vectors) and
``vblora_logits_B`` (out / L, r, vectors) select the k vectors with the largest logits, mixed by their softmax. With
``save_only_topk_weights`` their indices and weights are stored, without the last weight, as the weights sum to 1. The
update is B A.

Source: Li et al. (arXiv 2405.15179), equations 1 to 3, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Positive, to_typed, unreadable
from lorascope.formats.peft_factors import StoredFactors, check_indices, check_shapes, peft_factors, shared_factor
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles, StoredTensor
from lorascope.updates import LowRank
from lorascope.updates.linalg import as_float64

_BANK = "vblora_vector_bank"


class VBLoRAConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    r: Positive = 4
    topk: Positive = 2
    save_only_topk_weights: bool = False
    fan_in_fan_out: bool | None = None


@reads(lambda config, names: peft_kind(config) == "VBLORA", "VB-LoRA (PEFT)")
def read_vblora(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened VB-LoRA folder."""
    settings = to_typed(config, VBLoRAConfig, path / CONFIG)
    A, B = "vblora_logits_A", "vblora_logits_B"
    names = f"{A}|{B}|{A}_topk_weights|{B}_topk_weights"
    found, others = peft_factors(path, files, names, f"{A}_topk_indices|{B}_topk_indices")
    bank = shared_factor(path, files, _BANK)
    vectors, length = bank.shape
    shapes = {A: "r columns vectors", B: "rows r vectors"}
    known = {"vectors": vectors}
    if settings.save_only_topk_weights:
        shapes = {
            f"{name}_topk_{kind}": f"{sides.rpartition(' ')[0]} {kind}"
            for name, sides in shapes.items()
            for kind in ("weights", "indices")
        }
        known = {"weights": settings.topk - 1, "indices": settings.topk}
    if settings.topk > vectors:
        raise unreadable(path, f"topk must be <= {vectors}, the vectors of {_BANK}, got {settings.topk}")
    parts = {}
    for module, factors in found.items():
        sizes = check_shapes(path, module, factors, shapes, r=settings.r, **known)
        sides = sizes["rows"] * length, sizes["columns"] * length
        if settings.save_only_topk_weights:
            for name in (A, B):
                check_indices(path, module, factors, f"{name}_topk_indices", vectors)
        build = partial(_mixed_product, settings.topk, bank)
        transposed = bool(settings.fan_in_fan_out)
        parts[module] = StoredFactors(factors, sides, settings.r, build, transposed=transposed)
    others = tuple(name for name in others if not name.endswith(_BANK))
    return AdapterFiles(path, dict(config), parts, others, files, "VB-LoRA", shared_size=vectors * length)


def _mixed_product(k: int, bank: StoredTensor, arrays: dict[str, np.ndarray]) -> LowRank:
    vectors = as_float64(bank.read())
    mixed = []
    for name in ("vblora_logits_A", "vblora_logits_B"):
        if name in arrays:
            logits = as_float64(arrays[name])
            chosen = np.argpartition(logits, -k, axis=-1)[..., -k:]
            top = np.take_along_axis(logits, chosen, -1)
            weights = np.exp(top - top.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
        else:
            chosen, first = arrays[f"{name}_topk_indices"], as_float64(arrays[f"{name}_topk_weights"])
            weights = np.concatenate([first, 1 - first.sum(-1, keepdims=True)], -1)
            chosen = chosen.astype(np.int64)
        mixed.append((weights[..., None] * vectors[chosen]).sum(-2))
    A, B = mixed
    return LowRank(B.swapaxes(1, 2).reshape(-1, B.shape[1]), A.reshape(len(A), -1))
