"""Reader of PEFT GraLoRA folders.

The weight is a grid of k x k blocks, each with an own update of rank q = r / k. ``gralora_A`` (k, in / k, r) and
``gralora_B`` (k, r, out / k) contain the factors: out-block c and in-block a have A[a][:, c q:(c + 1) q] and
B[c][a q:(a + 1) q]. ``gralora_A_general`` and ``gralora_B_general`` of rank ``hybrid_r`` add a common product. All are
multiplied by alpha / (r + hybrid_r). Together they are one product of rank k r + hybrid_r.

Source: Jung et al. (arXiv 2505.20355), equation 6, as in PEFT.
"""

from __future__ import annotations

import numpy as np

from lorascope.files.printable import printable
from lorascope.files.typed_json import Count, Finite, Positive
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule, Sizes
from lorascope.updates import Dense, LowRank, Update

_GRID = {"gralora_A": "gralora_k inner r", "gralora_B": "gralora_k r outer"}
_GENERAL = {"gralora_A_general": "hybrid_r in", "gralora_B_general": "out hybrid_r"}


class GraLoRA(PeftFormat, frozen=True):
    """PEFT's GraLoRA: grid of low-rank blocks plus a common product."""

    kind = "GraLoRA"
    tensors = _GRID | _GENERAL
    r: Positive = 32
    hybrid_r: Count = 0
    alpha: Finite = 64
    gralora_k: Positive = 2
    fan_in_fan_out: bool | None = None

    def __post_init__(self) -> None:
        if self.r % self.gralora_k:
            raise ValueError(f"r must be a multiple of gralora_k, got {self.r} and {self.gralora_k}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.r + self.hybrid_r)

    def required(self, module: PeftModule) -> dict[str, str]:
        return self.tensors if self.hybrid_r else _GRID

    def shape(self, sizes: Sizes) -> tuple[int, int]:
        return self.gralora_k * sizes["outer"], self.gralora_k * sizes["inner"]

    def check(self, module: PeftModule) -> None:
        sizes, (outer, inner) = module.sizes, self.shape(module.sizes)
        if self.hybrid_r and (sizes["out"], sizes["in"]) != (outer, inner):
            must = f"general factors of {printable(module.name)} must fit its blocks, {outer} x {inner}"
            raise module.error(f"{must}, got {sizes['out']} x {sizes['in']}")

    def rank(self, sizes: Sizes) -> int | None:
        rank = self.gralora_k * self.r + self.hybrid_r
        if rank >= min(self.shape(sizes)):
            return None  # the factors would be larger than the matrix
        return rank

    def update(self, arrays: Arrays) -> Update:
        grid_A, grid_B = arrays["gralora_A"], arrays["gralora_B"]
        k, inner, rank = grid_A.shape
        outer, q = grid_B.shape[2], rank // k
        A, B = np.zeros((k, k, q, k, inner)), np.zeros((k, outer, k, k, q))
        for block in range(k):
            A[:, block, :, block] = grid_A[block].T.reshape(k, q, inner)
            B[block, :, block] = grid_B[block].T.reshape(outer, k, q)
        A, B = A.reshape(k * rank, k * inner), B.reshape(k * outer, k * rank)
        if self.hybrid_r:
            A, B = np.vstack([A, arrays["gralora_A_general"]]), np.hstack([B, arrays["gralora_B_general"]])
        product = LowRank(B, A, self.scale)
        if product.rank >= min(product.shape):
            return Dense(product.dense())
        return product
