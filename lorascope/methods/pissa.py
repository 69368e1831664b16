r"""PiSSA: the factors start at the principal singular vectors of the weight; the rest stays frozen.

.. math::

    W = W^{res} + s B A, \qquad W^{res} = W_0 - s B_0 A_0, \qquad
        s B_0 A_0 = U_{:r} \Sigma_{:r} V_{:r}^T

Both initial factors have the roots of the singular values, divided by s: B_0 = U_{:r} (\Sigma_{:r} / s)^{1/2} and
A_0 = (\Sigma_{:r} / s)^{1/2} V_{:r}^T. Training starts from the pretrained model.

=========  ==========================================================
paper      here
=========  ==========================================================
r          ``rank``
A, B       ``B`` (out, rank) and ``A`` (rank, in)
W^res      W_0 - s B_0 A_0, with the buffers ``B0`` and ``A0``
=========  ==========================================================

Source: PiSSA (arXiv 2404.02948), equations 2 to 4.

Departs:

- The host keeps W_0, and the adapter subtracts s B_0 A_0, so that the update is exactly W - W_0.
- Singular vectors are exact; the paper's fast variant uses a randomized SVD.
- The defaults alpha = rank = 8 give s = 1, as in the authors' code: set alpha with the rank.
- Dropout applies to the input of A only, as in PEFT.
- Embeddings are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapters.delta import host_weight
from lorascope.array_types import Float
from lorascope.methods.field_checks import require
from lorascope.methods.lora import LoRA, LoRADelta
from lorascope.methods.method import reject_embedding
from lorascope.methods.precision import wide_dtype


@dataclass(kw_only=True)
class PiSSA(LoRA, name="pissa"):
    """Low-rank adaptation of the principal singular components of the weight.

    Parameters
    ----------
    rank, alpha, dropout, targets, rslora
        See ``LoRA``.
    """

    decomposes_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "init_seed", "None, because PiSSA starts from the weight, not at random", self.init_seed is None)
        require(self, "embedding_init", "'peft', because PiSSA adapts no embeddings", self.embedding_init == "peft")

    def delta(self, name: str, host: nn.Module) -> ResidualDelta:
        """Return the factors of one module at its principal singular components."""
        reject_embedding(self, name, host)
        rank, scale, dropout = self.factor_options(name)
        return ResidualDelta(host, *_principal_factors(host_weight(host).detach(), rank, scale), scale, dropout)


class ResidualDelta(LoRADelta):
    """PiSSA's update scale * (B A - B0 A0): factors start at B0, A0 and train on the residual W_0 - scale * B0 A0.

    The host keeps W_0, so its hash, its norms and the weights after ``detach`` are exact. The update is zero at step 0.
    """

    A0: Tensor
    B0: Tensor

    def __init__(
        self,
        host: nn.Module,
        B: Float[Tensor, "out rank"],
        A: Float[Tensor, "rank in"],
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(host, len(A), scale, dropout, torch.Generator())  # leaves the global generator unchanged
        with torch.no_grad():
            self.A.copy_(A)
            self.B.copy_(B)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def weight(self) -> Float[Tensor, "out in"]:
        return super().weight() - self.scale * (self.B0 @ self.A0)

    @property
    def left(self) -> Float[Tensor, "out columns"]:
        return torch.cat([self.B, -self.B0], 1)

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch columns"]:
        """Return A x, with dropout, and A0 x, in one product if possible."""
        x = x.to(self.A.dtype)
        # W_0 - s B_0 A_0 is part of the frozen weight, so its input has no dropout.
        if self.dropout and self.training:
            return torch.cat([F.linear(F.dropout(x, self.dropout), self.A), F.linear(x, self.A0)], -1)
        return F.linear(x, torch.cat([self.A, self.A0]))

    def factors(self) -> dict[str, Tensor]:
        return super().factors() | {"B0": self.B0, "A0": self.A0}


def _principal_factors(
    W: Float[Tensor, "out in"], rank: int, scale: float
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return B_0 and A_0, in float32 or wider."""
    # Half precision has no singular value decomposition.
    U, sigma, Vh = torch.linalg.svd(W.to(wide_dtype(W)), full_matrices=False)
    # Equations 2 and 3, with the scale divided out so that s B_0 A_0 has the singular values of W.
    root = torch.sqrt(sigma[:rank] / scale)
    return U[:, :rank] * root, root.unsqueeze(1) * Vh[:rank]
