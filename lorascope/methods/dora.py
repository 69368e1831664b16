r"""DoRA: the weight is split into a magnitude per output and a direction, which a low-rank product updates.

.. math::

    W = m \frac{V}{\|V\|}, \qquad V = W_0 + s B A, \qquad s = \alpha / r

The norm is taken by row of (out, in). The magnitude m starts at the row norms of W_0 and B at zero, so training starts
from the pretrained model.

=========  ==========================================================
paper      here
=========  ==========================================================
m          ``magnitude`` (out,)
V          W_0 + s B A
A, B       the factors ``A`` (rank, in), ``B`` (out, rank)
r, alpha   ``rank``, ``alpha``
=========  ==========================================================

Source: DoRA (arXiv 2402.09353), equation 5; section 4.3, by which the norm of V is a constant in the gradient.

Departs:

- The norm is taken over the weights of one output, a row of (out, in), as in PEFT; the paper writes columns of the
  transposed weight.
- With dropout, the input of the whole adapted map is dropped, as in PEFT; the bias and W_0 x itself are not.
- Magnitudes have no weight decay; transformers' Trainer decays them.
- Embeddings are rejected.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, host_weight, to_array
from lorascope.adapters.weight_parts import stored_weight
from lorascope.array_types import Float
from lorascope.methods.field_checks import require
from lorascope.methods.lora import LoRA, LoRADelta
from lorascope.methods.method import reject_embedding
from lorascope.methods.precision import wide_dtype
from lorascope.updates import WeightDecomposed


@dataclass(kw_only=True)
class DoRA(LoRA, name="dora"):
    """Low-rank adaptation of the direction of the weight, with a trained magnitude per output.

    Magnitudes have no weight decay, unlike under transformers' Trainer.

    Parameters
    ----------
    rank, alpha, dropout, targets, rslora, init_seed
        See ``LoRA``.
    """

    decomposes_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "embedding_init", "'peft', because DoRA adapts no embeddings", self.embedding_init == "peft")

    def delta(self, name: str, host: nn.Module) -> DoRADelta:
        """Return direction and magnitude of one module."""
        reject_embedding(self, name, host)
        return DoRADelta(host, *self.factor_options(name), self._generator)


class CopiedBase(NamedTuple):
    """Reference to a copy of W_0, and the address and version of the weight when it was copied."""

    key: tuple[int, int]
    array: weakref.ref[np.ndarray]


class DoRADelta(LoRADelta):
    """DoRA's update ``m V / |V| - W_0`` of one module. Parameters: see ``LoRADelta``."""

    _copied: CopiedBase | None = None

    def __init__(self, host: nn.Module, *arguments: Any, **options: Any) -> None:
        super().__init__(host, *arguments, **options)
        # B is zero, so V is W_0, and with its norms the first update is zero.
        W0 = host_weight(host).detach()
        self.magnitude = nn.Parameter(torch.linalg.norm(W0.to(wide_dtype(W0)), dim=1))

    def _ratio(self, W0: Float[Tensor, "out in"]) -> Float[Tensor, "out"]:
        """Return m / |V|, with the norm as a constant of the gradient."""
        # Section 4.3: a gradient through the norm would need more memory and hardly change the result.
        norm = torch.linalg.norm(W0 + self.scale * (self.B @ self.A).detach(), dim=1)
        return self.magnitude / norm.to(self.magnitude.dtype)

    def weight(self) -> Float[Tensor, "out in"]:
        W0 = host_weight(self.host).detach()
        return self._ratio(W0).unsqueeze(1) * (W0 + self.scale * (self.B @ self.A)) - W0

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        W0 = host_weight(self.host).detach()
        x = F.dropout(x, self.dropout, self.training)
        ratio = self._ratio(W0)
        # The host adds W_0 x, so its part here is only the change of magnitude.
        hidden = F.linear(x.to(self.A.dtype), self.A)
        return (ratio - 1) * F.linear(x, W0) + ratio * F.linear(hidden, self.B) * self.scale

    def affine(
        self, x: Float[Tensor, "*batch in"], W: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """As in the base class, but without dropout the product W_0 x is computed once."""
        if self.dropout and self.training:
            return Delta.affine(self, x, W, b)
        ratio, product = self._ratio(W.detach()), F.linear(x, W)
        output = ratio * (product + self.scale * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B))
        return (output if b is None else output + b).to(product.dtype)

    def factors(self) -> dict[str, Tensor]:
        """Return A, B and the magnitude."""
        return {"A": self.A, "B": self.B, "magnitude": self.magnitude}

    def update(self) -> WeightDecomposed:
        """Return a copy of the update, with W_0."""
        arrays = {name: to_array(factor) for name, factor in self.factors().items()}
        return WeightDecomposed.from_factors(arrays | {"W0": self._copy_base()}, self.scale)

    def _copy_base(self) -> Float[np.ndarray, "out in"]:
        """Return a copy of W_0, or the copy of an earlier update that still exists if W_0 has not changed since.

        Recordings hold several updates of a module at a time, and copies would take several times the memory of the
        base.
        """
        weight = stored_weight(self.host)
        if weight.requires_grad or weight.is_inference():  # inference tensors have no version
            return to_array(host_weight(self.host))
        key = weight.data_ptr(), weight._version
        copied = self._copied
        if copied is not None and copied.key == key and (array := copied.array()) is not None:
            return array
        array = to_array(host_weight(self.host))
        self._copied = CopiedBase(key, weakref.ref(array))
        return array

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the reference to a copy of W_0, which cannot be pickled."""
        return super().__getstate__() | {"_copied": None}
