"""Reader of PEFT BOFT folders.

Each module has ``boft_R`` (m, blocks, b, b) and ``boft_s`` (out, 1). With one butterfly factor (m = 1), the
skew-symmetric parts S of the blocks define a block-diagonal rotation Q = (I - S) (I + S)^-1 of the inputs, and W = s *
(W_0 Q^T). The update W - W_0 requires the base model. Products of several butterfly factors are merged by PEFT.

Source: Liu et al. (arXiv 2311.06243), equation 4, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.formats.peft_format import Arrays, PeftFormat, Sizes
from lorascope.formats.peft_oft import cayley, rotate
from lorascope.formats.stored_update import stored_tensors
from lorascope.updates import Dense


class BOFT(PeftFormat, frozen=True):
    """PEFT's BOFT: rotations of the inputs by blocks, and rescaled outputs."""

    kind, needs = "BOFT", "base"
    tensors = {"boft_R": "1 blocks b b", "boft_s": "out*"}

    def requires_peft(self, files: Iterable[TensorFile]) -> bool:
        return any(".boft_R" in tensor.name and tensor.shape[0] > 1 for tensor in stored_tensors(files))

    def shape(self, sizes: Sizes) -> tuple[int, int]:
        return sizes["out"], sizes["blocks"] * sizes["b"]

    def update(self, arrays: Arrays, W0: np.ndarray) -> Dense:
        R = arrays["boft_R"][0]  # full blocks, of which only the skew-symmetric parts count
        Q = cayley((R - R.swapaxes(1, 2)) / 2)
        return Dense(arrays["boft_s"].reshape(-1, 1) * rotate(W0, Q) - W0)
