"""Reader of PEFT HRA folders.

Each module has ``hra_u`` (in, r), whose columns of unit length reflect the inputs one after the other:
W = W_0 (I - 2 u_1 u_1^T) (I - 2 u_2 u_2^T) ... With ``apply_GS`` the columns are orthonormalized first, which makes
W = W_0 (I - 2 U U^T). The update W - W_0 has rank r and requires the base model.

Source: Yuan et al. (arXiv 2405.17484), equations 5 and 6, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import to_typed
from lorascope.formats.peft_factors import StoredFactors, check_fit, check_shapes, from_base, peft_factors, require_base
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import LowRank
from lorascope.updates.linalg import as_float64


class HRAConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    apply_GS: bool = False


@reads(lambda config, names: peft_kind(config) == "HRA", "HRA (PEFT)", needs="base")
def read_hra(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened HRA folder."""
    settings = to_typed(config, HRAConfig, path / CONFIG)
    weights = require_base(path, config, base, "HRA")
    found, others = peft_factors(path, files, "hra_u")
    parts = {}
    for module, factors in found.items():
        sizes = check_shapes(path, module, factors, {"hra_u": "in r"})
        sides = weights.shape(module)
        check_fit(path, module, (sides[0], sizes["in"]), sides)
        build = from_base(weights, module, sides, partial(_reflection_change, settings.apply_GS))
        parts[module] = StoredFactors(factors, sides, min(sizes["r"], *sides), build)
    return AdapterFiles(path, dict(config), parts, others, files, "HRA", named_base(config) is None)


def _reflection_change(orthogonal: bool, arrays: dict[str, np.ndarray], W0: np.ndarray) -> LowRank:
    U = as_float64(arrays["hra_u"])
    if orthogonal:
        U = np.linalg.qr(U)[0]  # its signs do not matter
        return LowRank(-2 * W0 @ U, U.T)
    U = U / np.linalg.norm(U, axis=0)
    # Each reflection adds one component: W (I - 2 u u^T) = W - 2 (W u) u^T.
    B = np.empty((len(W0), U.shape[1]))
    for number, u in enumerate(U.T):
        B[:, number] = -2 * (W0 @ u + B[:, :number] @ (U[:, :number].T @ u))
    return LowRank(B, U.T)
