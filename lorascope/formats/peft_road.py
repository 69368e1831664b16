"""Reader of PEFT RoAd folders.

The outputs are rotated and scaled in pairs (j, j + g / 2) within groups of g = ``group_size``: y = c x + t rot(x), with
c = alpha cos(theta), t = alpha sin(theta) and rot(x) = (-x_second, x_first). ``road_theta`` and ``road_alpha`` have one
value per pair (variant road_1), per output (road_2), or per output and coefficient (road_4). The update R W_0 - W_0
requires the base model. The bias is rotated, too, which is not part of the update.

Source: Liao and Monz (arXiv 2409.00119), equation 4, as in PEFT.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lorascope.files.printable import printable
from lorascope.files.typed_json import Positive, unreadable
from lorascope.formats.peft_config import CONFIG
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.updates import Dense


class RoAd(PeftFormat, frozen=True):
    """PEFT's RoAd: rotations and scales of pairs of outputs."""

    kind, needs = "RoAd", "base"
    tensors = {"road_theta": "n", "road_alpha": "n"}
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Positive = 64

    def required(self, module: PeftModule) -> dict[str, str]:
        counts = {"road_1": module.shape[0] // 2, "road_2": module.shape[0], "road_4": 2 * module.shape[0]}
        return dict.fromkeys(self.tensors, str(counts[self.variant]))

    def check(self, module: PeftModule) -> None:
        outer, group = module.shape[0], self.group_size
        if group % 2 or outer % group:
            must = f"group_size must be even and divide {outer}, the outputs of {printable(module.name)}"
            raise unreadable(module.path / CONFIG, f"{must}, got {group}")

    def notes(self) -> tuple[str, ...]:
        return ("RoAd also rotates the biases of its modules; updates do not include biases",)

    def update(self, arrays: Arrays, W0: np.ndarray) -> Dense:
        theta, alpha, half = arrays["road_theta"], arrays["road_alpha"], self.group_size // 2
        # All have the shape (groups, 2, half, 1), or one that is broadcast to it.
        if self.variant == "road_4":
            theta, alpha = (values.reshape(-1, 2, 2, half, 1) for values in (theta, alpha))
            cosine, sine = alpha[:, 0] * np.cos(theta[:, 0]), alpha[:, 1] * np.sin(theta[:, 1])
        else:
            halves = {"road_1": 1, "road_2": 2}[self.variant]
            theta, alpha = (values.reshape(-1, halves, half, 1) for values in (theta, alpha))
            cosine, sine = alpha * np.cos(theta), alpha * np.sin(theta)
        W = W0.reshape(-1, 2, half, W0.shape[1])
        rotated = np.stack([-W[:, 1], W[:, 0]], 1)  # rot(x)
        return Dense((cosine * W + sine * rotated - W).reshape(W0.shape))
