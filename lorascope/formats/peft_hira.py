"""Reader of PEFT HiRA folders.

Each module has ``hira_A`` (r, in) and ``hira_B`` (out, r), or for an embedding ``hira_embedding_A`` and
``hira_embedding_B``. The update W_0 * (B A), elementwise, has a high rank and requires the base model.

Source: Huang et al. (ICLR 2025, "HiRA"), equation 2, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from lorascope.files.typed_json import Positive
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.updates import Dense


class HiRA(PeftFormat, frozen=True):
    """PEFT's HiRA: base weights times a product of rank r, elementwise."""

    kind, needs = "HiRA", "base"
    tensors = {"hira_A": "r in*", "hira_B": "out r*", "hira_embedding_A": "r in*", "hira_embedding_B": "out r*"}
    r: Positive = 32
    rank_pattern: dict[str, Positive] | None = None
    fan_in_fan_out: bool | None = None

    def of_module(self, source: Path) -> Callable[[str], HiRA]:
        # PEFT 0.21 looks up rank_pattern, and creates the module with r.
        return lambda module: self

    def notes(self) -> tuple[str, ...]:
        if not self.rank_pattern:
            return ()
        return ("rank_pattern has no effect: PEFT 0.21 gives all modules of HiRA the rank r",)

    def required(self, module: PeftModule) -> dict[str, str]:
        prefix = _prefix(module.tensors)
        return {f"{prefix}{side}": self.tensors[f"{prefix}{side}"] for side in "AB"}

    def update(self, arrays: Arrays, W0: np.ndarray) -> Dense:
        # The kernel of a convolution is part of the columns of A.
        A, B = (arrays[f"{_prefix(arrays)}{side}"] for side in "AB")
        return Dense(W0 * (B.reshape(len(B), -1) @ A.reshape(len(A), -1)))


def _prefix(names: Collection[str]) -> str:
    if {"hira_embedding_A", "hira_embedding_B"}.isdisjoint(names):
        return "hira_"
    return "hira_embedding_"
