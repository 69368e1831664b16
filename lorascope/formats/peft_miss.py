"""Reader of PEFT MiSS folders, and of its predecessor Bone.

Each module has ``miss_block`` (r, out), or ``bone_block``, which is repeated along the inputs: dW[o, i] = block[i mod
r, o], of rank r. With ``init_weights`` "mini", the block (r, mini_r) is also repeated along the outputs. With "bat", it
is (out / r, r, r), and each r x r block W of the base weight in block row a changes by W B_a + B_a, which requires the
base model. The number of inputs is stored nowhere and read from the base.

Source: Kang and Yin (arXiv 2409.15371), as in PEFT; Bone and its two forms as in PEFT 0.14 to 0.18.
"""

from __future__ import annotations

import numpy as np

from lorascope.files.typed_json import Positive
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule, Sizes
from lorascope.updates import Dense, LowRank, Update


class MiSS(PeftFormat, frozen=True):
    """PEFT's MiSS: block of rows that is repeated along the inputs."""

    kind, needs = "MiSS", "shapes"
    tensors = {"miss_block": "r out"}
    r: Positive = 64
    mini_r: Positive = 1
    init_weights: bool | str = True

    def required(self, module: PeftModule) -> dict[str, str]:
        shapes: dict[bool | str, str] = {"bat": "rows r r", "mini": "r mini_r"}
        return dict.fromkeys(self.tensors, shapes.get(self.init_weights, "r out"))

    def shape(self, sizes: Sizes) -> tuple[int, int]:
        if self.init_weights == "bat":  # sides that r does not divide do not fit the base
            return sizes["rows"] * self.r, sizes["in"] // self.r * self.r
        width = self.mini_r if self.init_weights == "mini" else 1
        return sizes["out"] // width * width, sizes["in"]

    def rank(self, sizes: Sizes) -> int | None:
        return None if self.init_weights == "bat" else min(self.r, *self.shape(sizes))

    def update(self, arrays: Arrays, module: PeftModule) -> Update:
        (block,) = arrays.values()  # miss_block or bone_block
        if self.init_weights == "bat":
            W0 = module.weight().reshape(len(block), self.r, -1, self.r).swapaxes(1, 2)  # (rows, columns, r, r)
            return Dense((W0 @ block[:, None] + block[:, None]).swapaxes(1, 2).reshape(module.shape))
        outer, inner = module.shape
        B = np.tile(block, (1, outer // block.shape[1])).T
        # Input i has row i mod r of the block, so A repeats the identity.
        return LowRank(B, np.eye(len(block))[:, np.arange(inner) % len(block)])


class Bone(MiSS, frozen=True):
    """MiSS in PEFT before 0.19."""

    kind = "Bone"
    tensors = {"bone_block": "r out"}
