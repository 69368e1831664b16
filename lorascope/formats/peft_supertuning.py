"""Reader of PEFT SuperTuning folders.

Each module has ``supertuning_values`` (n,), the changes of n entries of its weight, and ``supertuning_indices`` (n,),
their places in the weight read row by row. The factors ``supertuning_lora_A`` (r, in) and ``supertuning_lora_B`` (out,
r) add lora_alpha / r B A. Shapes are read from the base model.

Source: as in PEFT (arXiv 2607.09287).
"""

from __future__ import annotations

import numpy as np

from lorascope.files.typed_json import Finite, Positive
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.updates import Dense

_ENTRIES = {"supertuning_values": "n", "supertuning_indices": "n"}
_A, _B = "supertuning_lora_A", "supertuning_lora_B"


class SuperTuning(PeftFormat, frozen=True):
    """PEFT's SuperTuning: sparse changes of the weights plus a product; without ``r`` there are no factors."""

    kind, needs = "SuperTuning", "shapes"
    tensors = _ENTRIES | {_A: "r in", _B: "out r"}
    r: Positive | None = None
    lora_alpha: Finite | None = None

    def required(self, module: PeftModule) -> dict[str, str]:
        if not self.r and _A not in module.tensors:
            return _ENTRIES
        return _ENTRIES | {_A: f"r {module.shape[1]}", _B: f"{module.shape[0]} r"}

    def check(self, module: PeftModule) -> None:
        outer, inner = module.shape
        module.check_indices("supertuning_indices", outer * inner)

    def update(self, arrays: Arrays, module: PeftModule) -> Dense:
        matrix = np.zeros(module.shape)
        # Unlike +=, np.add.at adds both values of an entry that is listed twice.
        np.add.at(matrix.reshape(-1), arrays["supertuning_indices"], arrays["supertuning_values"])
        if _A in arrays:
            scale = 1.0
            if self.r:
                scale = (self.lora_alpha or self.r) / self.r
            matrix += scale * (arrays[_B] @ arrays[_A])
        return Dense(matrix)
