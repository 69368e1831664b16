"""Reader of PEFT IA3 folders.

Each module has one vector, ``ia3_l``, that rescales the outputs of its weight, (out, 1), or in feedforward modules the
inputs, (1, in): W = l * W_0. Convolutions store both kinds as (1, channels, 1, 1), and ``feedforward_modules`` of the
configuration decides. The update W - W_0 requires the base model. Where outputs are rescaled, so is the bias, which is
not part of the update.

Source: Liu et al. (arXiv 2205.05638), section 3.3, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import to_typed, unreadable
from lorascope.formats.peft_factors import StoredFactors, from_base, peft_factors, require_base, stored_shape
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.schema.name_patterns import Patterns
from lorascope.updates import Dense
from lorascope.updates.linalg import as_float64


class IA3Config(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool | None = None


@reads(lambda config, names: peft_kind(config) == "IA3", "IA3 (PEFT)", needs="base")
def read_ia3(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened IA3 folder."""
    settings = to_typed(config, IA3Config, path / CONFIG)
    weights = require_base(path, config, base, "IA3")
    found, others = peft_factors(path, files, "ia3_l")
    transposed = bool(settings.fan_in_fan_out)
    parts = {}
    for module, factors in found.items():
        stored = stored_shape(factors["ia3_l"])
        sides, count = weights.shape(module, transposed), math.prod(stored)
        by_input = stored[0] == 1 and (len(stored) == 2 or _is_feedforward(path, module, settings))
        kernel = math.prod(weights.stored_shape(module)[2:])
        wanted = sides[1] // kernel if by_input else sides[0]
        if count != wanted or max(stored) != count:
            must = f"ia3_l of {printable(module)} must have {wanted} values, one per {'in' if by_input else 'out'}put"
            raise unreadable(path, f"{must}, got shape {stored}")

        change = partial(_rescale_columns, kernel) if by_input else _rescale_rows
        build = from_base(weights, module, sides, change, transposed)
        parts[module] = StoredFactors(factors, sides, min(sides), build, transposed=transposed, thin=False)
    notes = ("IA3 also rescales the biases of modules whose outputs it rescales; updates do not include biases",)
    return AdapterFiles(path, dict(config), parts, others, files, "IA3", named_base(config) is None, notes)


def _rescale_rows(arrays: dict[str, np.ndarray], W0: np.ndarray) -> Dense:
    return Dense(W0 * (as_float64(arrays["ia3_l"]).reshape(-1, 1) - 1.0))


def _rescale_columns(kernel: int, arrays: dict[str, np.ndarray], W0: np.ndarray) -> Dense:
    return Dense(W0 * np.repeat(as_float64(arrays["ia3_l"]).reshape(-1) - 1.0, kernel))


def _is_feedforward(path: Path, module: str, settings: IA3Config) -> bool:
    named = settings.feedforward_modules or []
    if isinstance(named, str):
        return Patterns([named], f"feedforward_modules of {path / CONFIG}").first(module) is not None
    return any(module.endswith(name) for name in named)
