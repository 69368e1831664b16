"""Reader of PEFT GLoRA folders.

The update of a weight is W_0 * A + B, elementwise, and requires the base model. A and B are products of ``Xd`` (out, r)
and ``Xu`` (r, in), columns ``X`` (out, 1), or constants ``X`` (1,), according to ``config_A_B``. The tensors C, D and E
change the bias, which is not part of the update.

Source: Chavan et al. (arXiv 2306.07967), equation 10, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Positive, to_typed
from lorascope.formats.peft_factors import StoredFactors, check_shapes, from_base, peft_factors, require_base
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense
from lorascope.updates.linalg import as_float64

_SHAPES: dict[str, dict[str, str]] = {
    "lora": {"Xd": "out r", "Xu": "r in"},
    "vector": {"X": "out 1"},
    "constant": {"X": "1"},
    "none": {},
}


class GloraConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    r: Positive = 4
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"


@reads(lambda config, names: peft_kind(config) == "GLORA", "GLoRA (PEFT)", needs="base")
def read_glora(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened GLoRA folder."""
    settings = to_typed(config, GloraConfig, path / CONFIG)
    weights = require_base(path, config, base, "GLoRA")
    found, others = peft_factors(path, files, r"glora_[A-E]\.(?:Xd|Xu|X)")
    chosen = _SHAPES[settings.config_A_B].items()
    shapes = {f"glora_{side}.{name}": dimensions for side in "AB" for name, dimensions in chosen}
    parts = {}
    for module, factors in found.items():
        sides = weights.shape(module)
        check_shapes(path, module, factors, shapes, r=settings.r, out=sides[0], **{"in": sides[1]})
        build = from_base(weights, module, sides, _scale_and_add)
        parts[module] = StoredFactors(factors, sides, min(sides), build, thin=False)
    notes = ("GLoRA also changes the biases of its modules; updates do not include biases",)
    return AdapterFiles(path, dict(config), parts, others, files, "GLoRA", named_base(config) is None, notes)


def _scale_and_add(arrays: dict[str, np.ndarray], W0: np.ndarray) -> Dense:
    return Dense(W0 * _matrix(arrays, "glora_A") + _matrix(arrays, "glora_B"))


def _matrix(arrays: dict[str, np.ndarray], side: str) -> np.ndarray:
    """Return a matrix that is broadcast to the shape of the weight."""
    if f"{side}.Xd" in arrays:
        return as_float64(arrays[f"{side}.Xd"]) @ as_float64(arrays[f"{side}.Xu"])
    return as_float64(arrays[f"{side}.X"]) if f"{side}.X" in arrays else np.zeros(())
