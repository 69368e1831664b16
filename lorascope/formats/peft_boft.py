"""Reader of PEFT BOFT folders.

Each module has ``boft_R`` (m, blocks, b, b) and ``boft_s`` (out, 1). With one butterfly factor (m = 1), the
skew-symmetric parts S of the blocks define a block-diagonal rotation Q = (I - S) (I + S)^-1 of the inputs, and W = s *
(W_0 Q^T). The update W - W_0 requires the base model. Products of several butterfly factors are merged by PEFT.

Source: Liu et al. (arXiv 2311.06243), equation 4, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.formats.peft_factors import (
    StoredFactors,
    check_fit,
    check_shapes,
    from_base,
    peft_factors,
    require_base,
    stored_shape,
)
from lorascope.formats.peft_lora import peft_kind
from lorascope.formats.peft_merge import read_merged
from lorascope.formats.peft_oft import rotate
from lorascope.formats.pretrained_weights import PretrainedWeights, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense
from lorascope.updates.linalg import as_float64


@reads(lambda config, names: peft_kind(config) == "BOFT", "BOFT (PEFT)", needs="base")
def read_boft(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened BOFT folder."""
    found, others = peft_factors(path, files, "boft_R|boft_s")
    if any(stored_shape(factors["boft_R"])[0] > 1 for factors in found.values() if "boft_R" in factors):
        return read_merged(path, config, files, base)
    weights = require_base(path, config, base, "BOFT")
    parts = {}
    for module, factors in found.items():
        sizes = check_shapes(path, module, factors, {"boft_R": "1 blocks b b", "boft_s": "*"})
        sides = weights.shape(module)
        rows = math.prod(stored_shape(factors["boft_s"]))
        check_fit(path, module, (rows, sizes["blocks"] * sizes["b"]), sides)
        build = from_base(weights, module, sides, _rotation_change)
        parts[module] = StoredFactors(factors, sides, min(sides), build, thin=False)
    return AdapterFiles(path, dict(config), parts, others, files, "BOFT", named_base(config) is None)


def _rotation_change(arrays: dict[str, np.ndarray], W0: np.ndarray) -> Dense:
    R = as_float64(arrays["boft_R"])[0]
    S, identity = (R - R.swapaxes(1, 2)) / 2, np.eye(R.shape[-1])
    Q = np.linalg.solve((identity + S).swapaxes(1, 2), (identity - S).swapaxes(1, 2)).swapaxes(1, 2)
    return Dense(as_float64(arrays["boft_s"]).reshape(-1, 1) * rotate(W0, Q) - W0)
