"""A method that trains one factor per module: W = (1 + c) W_0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, host_weight
from lorascope.methods.method import AdapterMethod


@dataclass(kw_only=True)
class Scaled(AdapterMethod, name="scaled"):
    """A scale per module."""

    targets: str | tuple[str, ...] = ("q", "v")

    def delta(self, name: str, host: nn.Module) -> ScaledDelta:
        """Return the scale of one module."""
        return ScaledDelta()


class ScaledDelta(Delta):
    """The update c W_0."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(()))

    def weight(self) -> Tensor:
        return self.c * host_weight(self.host).detach()
