"""Reader of PEFT C3A folders.

Each module has ``c3a_kernel`` (out / b, in / b, b), the kernels of circulant blocks: entry [p, q] of a block is
kernel[(q - p) mod b] / in.

Source: Chen et al. (arXiv 2407.19342), equation 4, as in PEFT.
"""

from __future__ import annotations

import numpy as np

from lorascope.formats.peft_format import Arrays, PeftFormat, Sizes
from lorascope.updates import Dense


class C3A(PeftFormat, frozen=True):
    """PEFT's C3A: circulant blocks."""

    kind = "C3A"
    tensors = {"c3a_kernel": "rows columns b"}

    def shape(self, sizes: Sizes) -> tuple[int, int]:
        return sizes["rows"] * sizes["b"], sizes["columns"] * sizes["b"]

    def update(self, arrays: Arrays) -> Dense:
        kernel = arrays["c3a_kernel"]
        rows, columns, size = kernel.shape
        shifts = (np.arange(size) - np.arange(size)[:, None]) % size  # (q - p) mod b at [p, q]
        blocks = kernel[:, :, shifts].swapaxes(1, 2)
        return Dense(blocks.reshape(rows * size, columns * size) / (columns * size))
