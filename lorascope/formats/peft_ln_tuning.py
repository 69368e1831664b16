"""Reader of PEFT LN_TUNING folders.

They store the tuned layer norms in full: ``ln_tuning_layers.weight`` and ``ln_tuning_layers.bias``. The update is the
change of the weight, as a matrix with one column, and requires the base model. Biases are listed as other tensors.

Source: Zhao et al. (arXiv 2312.11420), as in PEFT.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lorascope.formats.peft_factors import StoredFactors
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.updates import Dense


class LNTuning(PeftFormat, frozen=True):
    """PEFT's LN_TUNING: tuned layer norms."""

    kind, needs = "LN_TUNING", "base"
    tensors = {"ln_tuning_layers": "out in*"}

    def stored_update(self, module: PeftModule) -> StoredFactors:
        return replace(super().stored_update(module), copies_weight=True)

    def update(self, arrays: Arrays, W0: np.ndarray) -> Dense:
        return Dense(arrays["ln_tuning_layers"].reshape(W0.shape) - W0)
