"""Reader of PEFT IA3 folders.

Each module has one vector, ``ia3_l``, that rescales the outputs of its weight, (out, 1), or in feedforward modules the
inputs, (1, in): W = l * W_0. Convolutions store both kinds as (1, channels, 1, 1), and ``feedforward_modules`` of the
configuration decides. The update W - W_0 requires the base model. Where outputs are rescaled, so is the bias, which is
not part of the update.

Source: Liu et al. (arXiv 2205.05638), section 3.3, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from lorascope.files.printable import printable
from lorascope.formats.peft_factors import stored_shape
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.schema.name_patterns import Patterns
from lorascope.updates import Dense


class IA3(PeftFormat, frozen=True):
    """PEFT's IA3: rescaled outputs or inputs."""

    kind, needs = "IA3", "base"
    tensors = {"ia3_l": "*"}
    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool | None = None

    def of_module(self, source: Path) -> Callable[[str], IA3]:
        """Return the function from a module to its settings, which list it if it is a feedforward module."""
        ends = self.feedforward_modules or []
        if isinstance(ends, str):
            pattern = Patterns([ends], f"feedforward_modules of {source}")
            return lambda module: replace(self, feedforward_modules=pattern.first(module) and [module])
        return lambda module: replace(self, feedforward_modules=[end for end in ends if module.endswith(end)])

    def rescales_inputs(self, shape: tuple[int, ...]) -> bool:
        """Return whether a vector of this shape rescales the inputs of a module with these settings."""
        # Convolutions store (1, channels, 1, 1) for both, so the settings decide.
        return shape[0] == 1 and (len(shape) == 2 or bool(self.feedforward_modules))

    def check(self, module: PeftModule) -> None:
        assert module.base is not None
        stored, (outer, inner) = stored_shape(module.tensors["ia3_l"]), module.shape
        count, unit = outer, "output"
        if self.rescales_inputs(stored):
            count, unit = inner // math.prod(module.base.stored_shape(module.name)[2:]), "input"
        if max(stored) != count or math.prod(stored) != count:
            must = f"ia3_l of {printable(module.name)} must have {count} values, one per {unit}"
            raise module.error(f"{must}, got shape {stored}")

    def notes(self) -> tuple[str, ...]:
        return ("IA3 also rescales the biases of modules whose outputs it rescales; updates do not include biases",)

    def update(self, arrays: Arrays, W0: np.ndarray) -> Dense:
        change = arrays["ia3_l"].reshape(-1) - 1.0
        if self.rescales_inputs(arrays["ia3_l"].shape):
            # A convolution has one column for each value of the kernel of an input.
            return Dense(W0 * np.repeat(change, W0.shape[1] // len(change)))
        return Dense(W0 * change[:, None])
