"""Reader of PEFT DeLoRA folders.

Each module has ``delora_A`` (r, in), ``delora_B`` (out, r), the bound ``delora_lambda`` (1,) and the column norms of
its base weight, ``delora_w_norm`` (in,). Components have norm lambda / r before their columns are multiplied by w_norm.

Source: Bini et al. (arXiv 2503.18225), equation 8, as in PEFT.
"""

from __future__ import annotations

import numpy as np

from lorascope.files.typed_json import Positive
from lorascope.formats.peft_format import Arrays, PeftFormat, Sizes
from lorascope.updates import LowRank


class DeLoRA(PeftFormat, frozen=True):
    """PEFT's DeLoRA: product whose components have a learned norm."""

    kind = "DeLoRA"
    tensors = {"delora_A": "r in", "delora_B": "out r", "delora_lambda": "1", "delora_w_norm": "in"}
    frozen = ("delora_w_norm",)
    r: Positive = 8
    rank_pattern: dict[str, Positive] | None = None

    def rank(self, sizes: Sizes) -> int:
        return sizes["r"]

    def update(self, arrays: Arrays) -> LowRank:
        A, B, bound, column_norms = (arrays[name] for name in self.tensors)
        # PEFT clamps the norms, so that components of norm zero stay zero.
        norms = np.maximum(np.linalg.norm(A, axis=1), 1e-4) * np.maximum(np.linalg.norm(B, axis=0), 1e-4)
        return LowRank(B * (bound / len(A) / norms), A * column_norms)
