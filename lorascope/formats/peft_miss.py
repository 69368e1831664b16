"""Reader of PEFT MiSS folders, and of its predecessor Bone.

Each module has ``miss_block`` (r, out), or ``bone_block``, which is repeated along the inputs: dW[o, i] = block[i mod
r, o], of rank r. With ``init_weights`` "mini", the block (r, mini_r) is also repeated along the outputs. With "bat", it
is (out / r, r, r), and each r x r block W of the base weight in block row a changes by W B_a + B_a, which requires the
base model. The number of inputs is stored nowhere and read from the base.

Source: Kang and Yin (arXiv 2409.15371), as in PEFT; Bone and its two forms as in PEFT 0.14 to 0.18.
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
from lorascope.formats.peft_factors import StoredFactors, check_fit, check_shapes, from_base, peft_factors
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, base_with_shapes, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense, LowRank
from lorascope.updates.linalg import as_float64


class MissConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    r: Positive = 64
    mini_r: Positive = 1
    init_weights: bool | str = True


@reads(lambda config, names: peft_kind(config) in ("MISS", "BONE"), "MiSS and Bone (PEFT)", needs="base")
def read_miss(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened MiSS or Bone folder."""
    settings = to_typed(config, MissConfig, path / CONFIG)
    name = f"{peft_kind(config).lower()}_block"
    found, others = peft_factors(path, files, name)
    weights, r = base_with_shapes(path, config, base, "MiSS"), settings.r
    parts = {}
    for module, factors in found.items():
        outer, inner = sides = weights.shape(module)
        if settings.init_weights == "bat":
            sizes = check_shapes(path, module, factors, {name: "rows r r"}, r=r)
            check_fit(path, module, (sizes["rows"] * r, inner // r * r), sides)
            build = from_base(weights, module, sides, partial(_block_change, name))
            parts[module] = StoredFactors(factors, sides, min(sides), build, thin=False)
            continue
        repeats = outer // settings.mini_r if settings.init_weights == "mini" else 1
        check_shapes(path, module, factors, {name: "r out"}, r=r, out=outer // repeats)
        check_fit(path, module, (outer // repeats * repeats, inner), sides)
        parts[module] = StoredFactors(factors, sides, min(r, *sides), partial(_repeat, name, repeats, inner))
    kind = "MiSS" if name == "miss_block" else "Bone"
    return AdapterFiles(path, dict(config), parts, others, files, kind, named_base(config) is None)


def _repeat(name: str, repeats: int, inner: int, arrays: dict[str, np.ndarray]) -> LowRank:
    block = as_float64(arrays[name])
    return LowRank(np.tile(block, (1, repeats)).T, np.eye(len(block))[:, np.arange(inner) % len(block)])


def _block_change(name: str, arrays: dict[str, np.ndarray], W0: np.ndarray) -> Dense:
    B = as_float64(arrays[name])
    blocks = W0.reshape(len(B), B.shape[1], -1, B.shape[1]).swapaxes(1, 2)  # (rows, columns, r, r)
    return Dense((blocks @ B[:, None] + B[:, None]).swapaxes(1, 2).reshape(W0.shape))
