"""Reader of PEFT RoAd folders.

The outputs are rotated and scaled in pairs (j, j + g / 2) within groups of g = ``group_size``: y = c x + t rot(x), with
c = alpha cos(theta), t = alpha sin(theta) and rot(x) = (-x_second, x_first). ``road_theta`` and ``road_alpha`` have one
value per pair (variant road_1), per output (road_2), or per output and coefficient (road_4). The update R W_0 - W_0
requires the base model. The bias is rotated, too, which is not part of the update.

Source: Liao and Monz (arXiv 2409.00119), equation 4, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Positive, to_typed, unreadable
from lorascope.formats.peft_factors import StoredFactors, check_shapes, from_base, peft_factors, require_base
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense
from lorascope.updates.linalg import as_float64


class RoadConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Positive = 64


@reads(lambda config, names: peft_kind(config) == "ROAD", "RoAd (PEFT)", needs="base")
def read_road(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened RoAd folder."""
    settings = to_typed(config, RoadConfig, path / CONFIG)
    weights = require_base(path, config, base, "RoAd")
    found, others = peft_factors(path, files, "road_theta|road_alpha")
    parts = {}
    for module, factors in found.items():
        sides, group = weights.shape(module), settings.group_size
        if group % 2 or sides[0] % group:
            must = f"group_size must be even and divide {sides[0]}, the outputs of {printable(module)}"
            raise unreadable(path / CONFIG, f"{must}, got {group}")
        count = {"road_1": sides[0] // 2, "road_2": sides[0], "road_4": 2 * sides[0]}[settings.variant]
        check_shapes(path, module, factors, {"road_theta": "n", "road_alpha": "n"}, n=count)
        build = from_base(weights, module, sides, partial(_rotation_change, settings))
        parts[module] = StoredFactors(factors, sides, min(sides), build, thin=False)
    notes = ("RoAd also rotates the biases of its modules; updates do not include biases",)
    return AdapterFiles(path, dict(config), parts, others, files, "RoAd", named_base(config) is None, notes)


def _rotation_change(settings: RoadConfig, arrays: dict[str, np.ndarray], W0: np.ndarray) -> Dense:
    theta, alpha = (as_float64(arrays[name]) for name in ("road_theta", "road_alpha"))
    half = settings.group_size // 2
    # All have the shape (groups, 2, half, 1), or one that is broadcast to it.
    if settings.variant == "road_4":
        theta, alpha = (values.reshape(-1, 2, 2, half, 1) for values in (theta, alpha))
        cosine, sine = alpha[:, 0] * np.cos(theta[:, 0]), alpha[:, 1] * np.sin(theta[:, 1])
    else:
        halves = 1 if settings.variant == "road_1" else 2
        theta, alpha = (values.reshape(-1, halves, half, 1) for values in (theta, alpha))
        cosine, sine = alpha * np.cos(theta), alpha * np.sin(theta)
    W = W0.reshape(-1, 2, half, W0.shape[1])
    rotated = np.stack([-W[:, 1], W[:, 0]], 1)
    return Dense((cosine * W + sine * rotated - W).reshape(W0.shape))
