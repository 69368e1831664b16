"""Linear layers of bitsandbytes with a Delta.

This file imports bitsandbytes, which takes time and prints lines, so ``attach`` imports it only for such a layer.
"""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor

from lorascope.adapters.adapted_module import Adapted, register_adapted


class StableLinear4bit(Linear4bit):
    """4-bit layer of bitsandbytes whose weight an evaluation leaves as it is.

    In evaluation mode ``Linear4bit`` packs its weight in another order for some CPUs, for which it has no gradients.
    """

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.training = True  # the layer itself has no dropout
        return self


class Adapted4bit(Adapted, StableLinear4bit):
    """4-bit layer of bitsandbytes with a Delta."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return (output + self.delta(x)).to(output.dtype)


class AdaptedStable4bit(Adapted4bit):
    """4-bit layer of a base that lorascope has quantized, with a Delta."""


class Adapted8bit(Adapted, Linear8bitLt):
    """8-bit layer of bitsandbytes with a Delta."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return (output + self.delta(x)).to(output.dtype)


register_adapted(Linear4bit, Adapted4bit)
register_adapted(StableLinear4bit, AdaptedStable4bit)
register_adapted(Linear8bitLt, Adapted8bit)
