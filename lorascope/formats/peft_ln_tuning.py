"""Reader of PEFT LN_TUNING folders.

They store the tuned layer norms in full: ``ln_tuning_layers.weight`` and ``ln_tuning_layers.bias``. The update is the
change of the weight, as a matrix with one column, and requires the base model. Biases are listed as other tensors.

Source: Zhao et al. (arXiv 2312.11420), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.formats.peft_factors import StoredFactors, check_fit, from_base, peft_factors, require_base
from lorascope.formats.peft_lora import peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense
from lorascope.updates.linalg import as_float64


@reads(lambda config, names: peft_kind(config) == "LN_TUNING", "LN_TUNING (PEFT)", needs="base")
def read_ln_tuning(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened folder of tuned layer norms."""
    weights = require_base(path, config, base, "LN_TUNING")
    found, others = peft_factors(path, files, "ln_tuning_layers")
    parts = {}
    for module, factors in found.items():
        sides = weights.shape(module)
        check_fit(path, module, factors["ln_tuning_layers"].shape, sides)
        build = from_base(weights, module, sides, partial(_change, sides))
        parts[module] = StoredFactors(factors, sides, min(sides), build, thin=False)
    return AdapterFiles(path, dict(config), parts, others, files, "LN_TUNING", named_base(config) is None)


def _change(sides: tuple[int, int], arrays: dict[str, np.ndarray], W0: np.ndarray) -> Dense:
    return Dense(as_float64(arrays["ln_tuning_layers"]).reshape(sides) - W0)
