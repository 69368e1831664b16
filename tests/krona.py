r"""KronA: a frozen weight plus a Kronecker product of two trained factors.

.. math::

    W = W_0 + L \otimes R

R starts at zero, so training starts from the pretrained model. ``test_tenth_method`` adds this file to the package: its
updates have a form that no other method has.

Source: KronA (arXiv 2212.10650).

Departs:

- There is no scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, attached_deltas, host_weight, to_array
from lorascope.methods.method import AdapterMethod, Step
from lorascope.schema.records import Item, Quantity, Record, register
from lorascope.updates import Update

register(
    "train KronA",
    left_norm=Quantity("norm of the small factor", definition="Frobenius norm of the left factor"),
)


@dataclass(frozen=True, eq=False)
class Kronecker(Update, form="krona"):
    """The update kron(left, right)."""

    left: np.ndarray
    right: np.ndarray
    required = frozenset({"left", "right"})

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    def dense(self) -> np.ndarray:
        return np.kron(self.left.astype(np.float64), self.right.astype(np.float64))

    def to_factors(self) -> dict[str, Any]:
        return {"left": self.left, "right": self.right}

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Kronecker:
        return cls(factors["left"], factors["right"])


@dataclass(kw_only=True)
class KronA(AdapterMethod, name="krona"):
    """Update that is a Kronecker product of a small and a large factor."""

    size: int = 4
    targets: str | tuple[str, ...] = ("q", "v")
    lr: float = 1e-2
    head_lr: float = 1e-2

    def delta(self, name: str, host: nn.Module) -> KronDelta:
        return KronDelta(host, self.size)

    def records(self, step: Step) -> Iterable[Item]:
        for module, delta in attached_deltas(step.model).items():
            yield Record("left_norm", float(delta.left.detach().norm()), module)


class KronDelta(Delta):
    def __init__(self, host: nn.Module, size: int) -> None:
        super().__init__()
        outer, inner = host_weight(host).shape
        self.left = nn.Parameter(torch.randn(size, size) / size)
        self.right = nn.Parameter(torch.zeros(outer // size, inner // size))

    def weight(self) -> Tensor:
        return torch.kron(self.left, self.right)

    def update(self) -> Kronecker:
        return Kronecker(to_array(self.left), to_array(self.right))
