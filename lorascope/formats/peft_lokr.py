"""Reader of PEFT LoKr folders.

The update is scale * kron(w1, w2). Each matrix is stored in full, ``lokr_w1`` (a, b), or as a product of ``lokr_w1_a``
(a, r) and ``lokr_w1_b`` (r, b). In a convolution, w2 has the dimensions of the kernel after its own; with
``use_effective_conv2d`` it is the Tucker product of ``lokr_t2`` (r, r, k, k) with ``lokr_w2_a`` (r, c) and
``lokr_w2_b`` (r, d). In one-dimensional convolutions, PEFT aligns w1 with the last two axes of a full w2, and so does
this reader. The scale is always alpha / r. LyCORIS ignores alpha if both matrices are stored in full; PEFT does not.

Source: Yeh et al. (arXiv 2309.14859), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from lorascope.files.typed_json import Finite, Positive
from lorascope.formats.peft_factors import Factors, StoredFactors, stored_shape
from lorascope.formats.peft_format import PeftFormat, PeftModule, Sizes
from lorascope.formats.peft_loha import tucker
from lorascope.updates import Dense, Kronecker, LowRank, Update
from lorascope.updates.linalg import as_float64


class LoKr(PeftFormat, frozen=True):
    """PEFT's LoKr: Kronecker product of two matrices."""

    kind = "LoKr"
    tensors = dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), "*")
    r: Positive = 8
    alpha: Finite = 8
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, Finite] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def required(self, module: PeftModule) -> dict[str, str]:
        return kronecker_shapes(module.tensors)

    def stored_update(self, module: PeftModule) -> StoredFactors:
        update, w2 = kronecker_part(module.tensors, module.sizes, self.scale), module.tensors.get("lokr_w2")
        if w2 is None or len(stored_shape(w2)) != 3:  # three dimensions are a one-dimensional convolution
            return update
        return replace(update, build=partial(_misaligned, self.scale), components=min(update.sides), thin=False)


def kronecker_shapes(names: Collection[str]) -> dict[str, str]:
    """Return the shapes that the LoKr factors of one module must have, judging by their names."""
    left = {"lokr_w1": "a b"} if "lokr_w1" in names else {"lokr_w1_a": "a r", "lokr_w1_b": "r b"}
    if "lokr_w2" in names:
        return left | {"lokr_w2": "c d*"}
    if "lokr_t2" in names:
        return left | {"lokr_t2": "r r k1 k2", "lokr_w2_a": "r c", "lokr_w2_b": "r d"}
    return left | {"lokr_w2_a": "c r", "lokr_w2_b": "r d"}


def kronecker_part(factors: Factors, sizes: Sizes, scale: float) -> StoredFactors:
    """Return the stored LoKr update of one module with factors of these sizes."""
    right = (sizes["c"], sizes["d"] * sizes.get("k1", 1) * sizes.get("k2", 1))
    ranks = [min(sizes["a"], sizes["b"]), min(right)]
    if "lokr_w1" not in factors:
        ranks[0] = min(ranks[0], sizes["r"])
    if not {"lokr_w2", "lokr_t2"} & factors.keys():
        ranks[1] = min(ranks[1], sizes["r"])
    sides = sizes["a"] * right[0], sizes["b"] * right[1]

    def build(arrays: Mapping[str, np.ndarray]) -> Kronecker:
        return Kronecker(_matrix(arrays, "lokr_w1"), _matrix(arrays, "lokr_w2"), scale)

    return StoredFactors(factors, sides, ranks[0] * ranks[1], build, scale)


def _misaligned(scale: float, arrays: dict[str, np.ndarray]) -> Dense:
    """Compute the update of a one-dimensional convolution, where PEFT aligns w1 (a, b) with the last axes of w2."""
    left, right = _matrix(arrays, "lokr_w1").dense(), as_float64(arrays["lokr_w2"])
    return Dense(scale * np.kron(left, right).reshape(len(left) * len(right), -1))


def _matrix(arrays: Mapping[str, np.ndarray], name: str) -> Update:
    if name in arrays:
        return Dense(arrays[name].reshape(len(arrays[name]), -1))
    left, right = (as_float64(arrays[f"{name}_{side}"]) for side in "ab")
    if name == "lokr_w2" and "lokr_t2" in arrays:
        return Dense(tucker(as_float64(arrays["lokr_t2"]), left, right))
    return LowRank(left, right)
