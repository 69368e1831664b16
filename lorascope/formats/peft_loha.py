"""Reader of PEFT LoHa folders.

The update is the elementwise product of two low-rank matrices, scale * (w1_a @ w1_b) * (w2_a @ w2_b), with
``hada_w1_a`` (out, r) and ``hada_w1_b`` (r, in). It is also one product of rank r^2, which is used if that is below
both sides. A convolution has in * k * k columns; with ``use_effective_conv2d`` each matrix is a Tucker product of
``hada_t1`` (r, r, k, k) with ``hada_w1_a`` (r, out) and ``hada_w1_b`` (r, in).

Source: Hyeon-Woo et al. (arXiv 2108.06098), equation 4 and its Tucker form, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from lorascope.array_types import Float
from lorascope.files.typed_json import Finite, Positive
from lorascope.formats.peft_factors import Factors, StoredFactors
from lorascope.formats.peft_format import PeftFormat, PeftModule, Sizes
from lorascope.updates import Dense, LowRank, Update
from lorascope.updates.linalg import as_float64

_TUCKER = ("hada_t1", "hada_t2")


class LoHa(PeftFormat, frozen=True):
    """PEFT's LoHa: elementwise product of two low-rank matrices."""

    kind = "LoHa"
    tensors = dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *_TUCKER), "*")
    r: Positive = 8
    alpha: Finite = 8
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, Finite] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def required(self, module: PeftModule) -> dict[str, str]:
        return hadamard_shapes(module.tensors)

    def stored_update(self, module: PeftModule) -> StoredFactors:
        return hadamard_part(module.tensors, module.sizes, self.scale)


def hadamard_shapes(names: Collection[str]) -> dict[str, str]:
    """Return the shapes that the LoHa factors of one module must have, judging by their names."""
    if not any(name in names for name in _TUCKER):
        return {"hada_w1_a": "out r", "hada_w1_b": "r in", "hada_w2_a": "out r", "hada_w2_b": "r in"}
    factors = {"hada_w1_a": "r out", "hada_w1_b": "r in", "hada_w2_a": "r out", "hada_w2_b": "r in"}
    return factors | dict.fromkeys(_TUCKER, "r r k1 k2")


def hadamard_part(factors: Factors, sizes: Sizes, scale: float) -> StoredFactors:
    """Return the stored LoHa update of one module with these factors; ``sizes`` are their sides by name."""
    sides = sizes["out"], sizes["in"] * sizes.get("k1", 1) * sizes.get("k2", 1)
    rank = min(sizes["r"] ** 2, *sides)
    thin = "hada_t1" not in factors and rank < min(sides)
    return StoredFactors(factors, sides, rank, lambda arrays: _hadamard(arrays, scale), scale, thin=thin)


def _hadamard(arrays: Mapping[str, np.ndarray], scale: float) -> Update:
    """Compute the elementwise product of two matrices given by their factors, multiplied by ``scale``."""
    factors = {name: as_float64(array) for name, array in arrays.items()}
    w1_a, w1_b, w2_a, w2_b = (factors[f"hada_w{number}_{side}"] for number in (1, 2) for side in "ab")
    if "hada_t1" in factors:
        first, second = tucker(factors["hada_t1"], w1_a, w1_b), tucker(factors["hada_t2"], w2_a, w2_b)
        return Dense(scale * first * second)
    (outer, rank), inner = w1_a.shape, w1_b.shape[1]
    if rank**2 >= min(outer, inner):  # one product of rank r^2 would be larger than the matrix
        return Dense(scale * (w1_a @ w1_b) * (w2_a @ w2_b))
    B = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(outer, rank**2)
    A = (w1_b[:, None, :] * w2_b[None, :, :]).reshape(rank**2, inner)
    return LowRank(B, A, scale)


def tucker(
    core: Float[np.ndarray, "r s *kernel"], left: Float[np.ndarray, "r out"], right: Float[np.ndarray, "s in"]
) -> Float[np.ndarray, "out columns"]:
    """Compute a factor of LoHa from its Tucker form: sum_ij core[i, j] left[i, p] right[j, q] at [p, q].

    The kernel is part of the columns.
    """
    product = np.einsum("rskp,ro,sq->oqkp", core.reshape(*core.shape[:2], -1, 1), left, right, optimize=True)
    return product.reshape(left.shape[1], -1)
