"""Writer of adapter folders of mlx-lm: ``adapters.safetensors`` and ``adapter_config.json``.

``lora_a`` is A^T and ``lora_b`` is B^T. MLX has one rank and one scale for all modules:

- A module of a smaller rank is filled with components that are zero, which do not change its update.
- A scale that is a power of two times the common one is folded into ``lora_b``, which is exact. Other scales are
  refused.

Modules must have the names of a language model, as in transformers. The configuration lists them by their names inside
a layer, for all layers: a module that the file lacks remains at its initial update, which is zero.

Source: mlx-lm 0.32 (``tuner/utils.py``, ``tuner/lora.py``, ``tuner/dora.py``).
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from lorascope.export.exporters import LayerExporter
from lorascope.export.lora_layers import WritableLora
from lorascope.files.printable import printable
from lorascope.files.typed_tensors import TypedTensor, safetensors_bytes
from lorascope.files.whole_files import write_bytes, write_json
from lorascope.formats.mlx import WEIGHTS
from lorascope.formats.peft_config import CONFIG
from lorascope.runs.folders import new_folder

_NAME = re.compile(r"(?:language_model\.)?(?:model\.layers\.\d+\.(?P<inside>.+)|model\.embed_tokens|lm_head)")
_EXPERT = re.compile(r"\.experts\.\d+\.")


class MlxExporter(LayerExporter):
    """Exporter of adapter folders of mlx-lm."""

    format = "mlx"
    readers = ("read_mlx",)

    def write(self, lora: WritableLora, path: Path) -> None:
        lora.require_only_layers("MLX")
        decomposed = lora.decomposed("MLX")
        rank = max(layer.rank for layer in lora.layers.values())
        # The most frequent scale leaves the largest number of modules unchanged.
        scale = mode(layer.scale for layer in lora.layers.values())
        tensors: dict[str, TypedTensor] = {}
        keys: dict[str, None] = {}
        for module, layer in lora.layers.items():
            keys[_key(lora, module)] = None
            empty = (0, rank - layer.rank)
            tensors[f"{module}.lora_a"] = layer.A.map(partial(_transposed, ((0, 0), empty)))
            tensors[f"{module}.lora_b"] = _scaled(lora, module, scale).map(partial(_transposed, (empty, (0, 0))))
            if layer.magnitude is not None:
                tensors[f"{module}.m"] = layer.magnitude
        config: dict[str, Any] = {}
        for key, field in (("model", "base_model_name_or_path"), ("revision", "revision")):
            if lora.config.get(field):
                config[key] = lora.config[field]
        # -1 means all layers: modules that the file lacks remain at zero.
        config |= {"fine_tune_type": "dora" if decomposed else "lora", "num_layers": -1}
        # mlx-lm has no defaults for rank, scale and dropout.
        config |= {"lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(keys)}}
        with new_folder(path) as draft:
            write_bytes(draft / WEIGHTS, safetensors_bytes(tensors, {"format": "mlx"}))
            write_json(draft / CONFIG, config)


def _key(lora: WritableLora, module: str) -> str:
    """Return the name of a module inside its block; raise a ValueError if MLX cannot adapt it."""
    match, layer = _NAME.fullmatch(module), lora.layers[module]
    kind = ""
    if layer.kernel:
        kind = "a convolution"
    elif match is None:
        kind = "not named like a layer of a language model, model.layers.0. ..."
    elif _EXPERT.search(module):
        kind = "an expert"
    if match is None or kind:
        raise lora.error("MLX", f"{printable(module)} is {kind}")
    if layer.embedding and layer.magnitude is not None:
        reason = f"{printable(module)} is an embedding with one magnitude per column, and MLX has one per row"
        raise lora.error("MLX", reason)
    return match["inside"] or module


def _transposed(zeros: tuple[tuple[int, int], tuple[int, int]], factor: np.ndarray) -> np.ndarray:
    """Return the transposed factor with zeros before and after each axis."""
    return np.pad(factor.T, zeros)


def _scaled(lora: WritableLora, module: str, scale: float) -> TypedTensor:
    """Return B times the layer's scale relative to the common one, which must be a power of two."""
    layer = lora.layers[module]
    B, factor = layer.B, layer.scale / scale if scale else 0.0
    if layer.scale == scale:
        return B
    # A power of two, whose mantissa is 0.5, changes only exponents; ``exact`` is False if one leaves the dtype's range.
    folded = TypedTensor(np.asarray(B.values, np.float64) * factor, B.dtype)
    if abs(math.frexp(factor)[0]) != 0.5 or factor * scale != layer.scale or not folded.exact:
        reason = f"{printable(module)} has scale {layer.scale:g}, and MLX has one scale for all modules, here {scale:g}"
        fix = "only a power of two times that is exact; --budget 1 writes factors of scale 1, rounded to float32"
        raise lora.error("MLX", f"{reason}: {fix}")
    return folded
