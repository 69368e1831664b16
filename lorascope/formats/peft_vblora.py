"""Reader of PEFT VB-LoRA folders.

The rows of A (r, in) and the columns of B (out, r) consist of sub-vectors of length L, each a mix of k vectors of one
bank that all modules share, ``vblora_vector_bank`` (vectors, L). ``vblora_logits_A`` (r, in / L, vectors) and
``vblora_logits_B`` (out / L, r, vectors) select the k vectors with the largest logits, mixed by their softmax. With
``save_only_topk_weights`` their indices and weights are stored, without the last weight, as the weights sum to 1. The
update is B A.

Source: Li et al. (arXiv 2405.15179), equations 1 to 3, as in PEFT.
"""

from __future__ import annotations

import numpy as np

from lorascope.files.typed_json import Positive
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule, Sizes
from lorascope.updates import LowRank

_LOGITS = {"vblora_logits_A": "r columns", "vblora_logits_B": "rows r"}
_BANK = "vblora_vector_bank"


class VBLoRA(PeftFormat, frozen=True):
    """PEFT's VB-LoRA: product of factors that consist of mixed vectors of one bank."""

    kind = "VB-LoRA"
    tensors = {name + end: "*" for name in _LOGITS for end in ("", "_topk_weights", "_topk_indices")}
    shared = {_BANK: "vectors length"}
    r: Positive = 4
    topk: Positive = 2
    save_only_topk_weights: bool = False
    fan_in_fan_out: bool | None = None

    def required(self, module: PeftModule) -> dict[str, str]:
        shapes: dict[str, str] = {}
        for name, sides in _LOGITS.items():
            if self.save_only_topk_weights:  # the last weight follows from the others
                shapes |= {f"{name}_topk_weights": f"{sides} {self.topk - 1}", f"{name}_topk_indices": f"{sides} topk"}
            else:
                shapes[name] = f"{sides} vectors"
        return shapes

    def shape(self, sizes: Sizes) -> tuple[int, int]:
        return sizes["rows"] * sizes["length"], sizes["columns"] * sizes["length"]

    def check(self, module: PeftModule) -> None:
        vectors = module.sizes["vectors"]
        if self.topk > vectors:
            raise module.error(f"topk must be <= {vectors}, the vectors of {_BANK}, got {self.topk}")
        if self.save_only_topk_weights:
            for name in _LOGITS:
                module.check_indices(f"{name}_topk_indices", vectors)

    def rank(self, sizes: Sizes) -> int:
        return self.r

    def update(self, arrays: Arrays) -> LowRank:
        A, B = (self.mixed_vectors(name, arrays) for name in _LOGITS)
        # Sub-vectors follow each other along the inputs of A and along the outputs of B.
        return LowRank(B.swapaxes(1, 2).reshape(-1, B.shape[1]), A.reshape(len(A), -1))

    def mixed_vectors(self, name: str, arrays: Arrays) -> np.ndarray:
        """Return the sub-vectors of a factor, (r, columns, length) or (rows, r, length)."""
        if name in arrays:
            logits = arrays[name]
            indices = np.argpartition(logits, -self.topk, axis=-1)[..., -self.topk :]  # in any order
            top = np.take_along_axis(logits, indices, -1)
            weights = np.exp(top - top.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
        else:
            indices, first = arrays[f"{name}_topk_indices"], arrays[f"{name}_topk_weights"]
            weights = np.concatenate([first, 1 - first.sum(-1, keepdims=True)], -1)
        return (weights[..., None] * arrays[_BANK][indices]).sum(-2)
