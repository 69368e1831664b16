"""Initial factors of PiSSA and OLoRA, whose product PEFT subtracts from each base weight while it loads an adapter.

PEFT computes them from the base weight in float32: W_0 becomes W_0 - s B_0 A_0, so the change from the original base is
s (B A - B_0 A_0), of rank 2 r.

- PiSSA: s B_0 A_0 is the leading r singular components of W_0, divided evenly between both factors.
- OLoRA: B_0 and A_0 are the leading columns of Q and rows of R in W_0 = Q R. For a weight that is stored as (in, out),
  PEFT decomposes the stored matrix.

The randomized SVD of ``pissa_niter_N`` has other random numbers at every loading, so its factors cannot be computed.

Source: PEFT 0.21, ``pissa_init`` and ``olora_init``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from lorascope.array_types import Float, Float32
from lorascope.formats.pretrained_weights import OptionalBase, PretrainedWeights
from lorascope.formats.readers import Config
from lorascope.formats.stored_update import StoredLoRA
from lorascope.updates.linalg import all_finite

# Decompositions in LAPACK are exact for a matrix that differs from W_0 by a small multiple of its rounding.
_ERROR = 10 * np.finfo(np.float32).eps


class InitialFactors(NamedTuple):
    """Initial factors of one module, and a bound of the error of their product.

    Parameters
    ----------
    B : array (out, rank)
    A : array (rank, in)
    error : float
        Bound of the Frobenius norm of the error of scale * B @ A that follows from the arithmetic of float32.
    """

    B: Float32[np.ndarray, "out rank"]
    A: Float32[np.ndarray, "rank in"]
    error: float


@dataclass(frozen=True)
class SubtractedStart:
    """Initial product that PEFT subtracts from the base weight of one module; computed on the first access."""

    kind: Literal["pissa", "olora"]
    module: str
    base: PretrainedWeights
    shape: tuple[int, int]
    rank: int
    scale: float
    transposed: bool

    @cached_property
    def factors(self) -> InitialFactors:
        """Initial factors, from a decomposition of the whole weight, which is slow if it is large."""
        W = np.asarray(self.base.weight(self.module, self.shape, self.transposed), np.float32)
        if not all_finite(W):
            unknown = np.full_like(W, np.nan)
            return InitialFactors(unknown[:, : self.rank], unknown[: self.rank], np.nan)
        if self.kind == "pissa":
            return _pissa_factors(W, self.rank, self.scale)
        if self.transposed:
            Q, R, error = _olora_factors(W.T, self.rank)
            return InitialFactors(R.T, Q.T, abs(self.scale) * error)
        Q, R, error = _olora_factors(W, self.rank)
        return InitialFactors(Q, R, abs(self.scale) * error)

    def fitting_factors(self, A: Float[np.ndarray, "rank in"]) -> dict[str, Float32[np.ndarray, "..."]]:
        """Return A0 and B0 with the signs of the trained factors, of which A is one."""
        B0, A0, _ = self.factors
        # Singular vectors have an arbitrary sign. With that of the trained ones, B - B_0 and A - A_0 are small.
        signs = np.where(np.einsum("ri,ri->r", A, A0) < 0, np.float32(-1), np.float32(1))
        return {"A0": signs[:, None] * A0, "B0": B0 * signs}

    def product(self) -> Float[np.ndarray, "out in"]:
        """Compute scale * B_0 @ A_0 in float64."""
        B, A, _ = self.factors
        return self.scale * (B.astype(np.float64) @ A.astype(np.float64))


@dataclass(frozen=True)
class ResidualPart(StoredLoRA):
    """Stored update of PiSSA or OLoRA with its base: scale * (B @ A - B_0 @ A_0)."""

    start: SubtractedStart

    @property
    def rank(self) -> int:
        return 2 * super().rank

    def factors(self) -> dict[str, Any]:
        factors = super().factors()
        return factors | self.start.fitting_factors(factors["A"])


def subtracted_starts(
    config: Config, updates: Mapping[str, StoredLoRA], base: OptionalBase
) -> dict[str, SubtractedStart]:
    """Return the products that PEFT subtracts from base weights, by module; empty without a base."""
    kind = residual_kind(config)
    # Copies of a layer share one weight, from which PEFT subtracts several products in turn.
    if kind is None or base is None or config.get("layer_replication"):
        return {}
    starts = {}
    for module, update in updates.items():
        # PEFT initializes embeddings as plain LoRA, and its factors do not fit a transposed weight that is not square.
        is_unfit = kind == "olora" and update.transposed and update.shape[0] != update.shape[1]
        if ".lora_embedding_" in update.A.name or is_unfit or not base.has_weight(module):
            continue
        starts[module] = SubtractedStart(kind, module, base, update.shape, update.rank, update.scale, update.transposed)
    return starts


def change_from_original_base(
    config: Config, updates: Mapping[str, StoredLoRA], base: OptionalBase
) -> dict[str, StoredLoRA]:
    """Return the updates of a PEFT LoRA, with those of PiSSA and OLoRA relative to the original base weights."""
    starts = subtracted_starts(config, updates, base)
    residuals = {module: ResidualPart(**vars(updates[module]), start=start) for module, start in starts.items()}
    return {**updates, **residuals}


def has_unknown_start(config: Config) -> bool:
    """Return whether PEFT changes the base weights in a way that does not follow from them."""
    return str(config.get("init_lora_weights")).lower().startswith(("pissa_niter", "corda", "loftq", "lora_ga"))


def residual_kind(config: Config) -> Literal["pissa", "olora"] | None:
    """Return the kind of the initial factors that follow from the base weights; None for other adapters."""
    start = config.get("init_lora_weights")
    if start == "pissa":  # PEFT accepts other capitals only for OLoRA
        return "pissa"
    return "olora" if str(start).lower() == "olora" else None


def _pissa_factors(W: Float32[np.ndarray, "out in"], rank: int, scale: float) -> InitialFactors:
    U, sigma, Vt = np.linalg.svd(W, full_matrices=False)
    leading, following = sigma[:rank], np.append(sigma, 0)[rank]
    with np.errstate(divide="ignore", invalid="ignore"):  # a scale of 0, or two equal singular values
        roots = np.sqrt(leading / np.float32(scale))
        # A change of W_0 turns a singular vector towards the following ones, the more so the closer their values are.
        sensitivity = np.linalg.norm(leading / (leading - following)) * np.sqrt(2)
    return InitialFactors(U[:, :rank] * roots, roots[:, None] * Vt[:rank], float(sensitivity * _ERROR * sigma[0]))


def _olora_factors(W: Float32[np.ndarray, "m n"], rank: int) -> InitialFactors:
    """Return leading columns of Q and rows of R; the error concerns their product without the scale."""
    Q, R = np.linalg.qr(W)
    smallest = np.linalg.svd(R[:rank, :rank], compute_uv=False)[-1]
    with np.errstate(divide="ignore", invalid="ignore"):  # linearly dependent columns
        sensitivity = 1 + np.linalg.norm(W) / smallest
    return InitialFactors(Q[:, :rank], R[:rank], float(sensitivity * _ERROR * np.linalg.norm(W)))
