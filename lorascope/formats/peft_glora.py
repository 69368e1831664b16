"""Reader of PEFT GLoRA folders.

The update of a weight is W_0 * A + B, elementwise, and requires the base model. A and B are products of ``Xd`` (out, r)
and ``Xu`` (r, in), columns ``X`` (out, 1), or constants ``X`` (1,), according to ``config_A_B``. The tensors C, D and E
change the bias, which is not part of the update.

Source: Chavan et al. (arXiv 2306.07967), equation 10, as in PEFT.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lorascope.files.typed_json import Positive
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.updates import Dense


class GLoRA(PeftFormat, frozen=True):
    """PEFT's GLoRA: scaled base weights plus a matrix."""

    kind, needs = "GLoRA", "base"
    # C, D and E change only the bias, but are trained values of the adapter as well.
    tensors = {f"glora_{matrix}.{name}": "*" for matrix in "ABCDE" for name in ("Xd", "Xu", "X")}
    r: Positive = 4
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"

    def required(self, module: PeftModule) -> dict[str, str]:
        outer, inner = module.shape
        shapes: dict[str, dict[str, str]] = {
            "lora": {"Xd": f"{outer} r", "Xu": f"r {inner}"},
            "vector": {"X": f"{outer} 1"},
            "constant": {"X": "1"},
            "none": {},
        }
        sides = shapes[self.config_A_B].items()
        return {f"glora_{matrix}.{name}": dimensions for matrix in "AB" for name, dimensions in sides}

    def notes(self) -> tuple[str, ...]:
        return ("GLoRA also changes the biases of its modules; updates do not include biases",)

    def update(self, arrays: Arrays, W0: np.ndarray) -> Dense:
        return Dense(W0 * _matrix(arrays, "glora_A") + _matrix(arrays, "glora_B"))


def _matrix(arrays: Arrays, name: str) -> np.ndarray:
    """Return a matrix that is broadcast to the shape of the weight."""
    if f"{name}.Xd" in arrays:
        return arrays[f"{name}.Xd"] @ arrays[f"{name}.Xu"]
    return arrays.get(f"{name}.X", np.zeros(()))  # config_A_B "none" stores no tensor
