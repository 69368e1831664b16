r"""VeRA: frozen random factors, shared by all modules, scaled by two trained vectors per module.

.. math::

    W = W_0 + \operatorname{diag}(b) \, B \operatorname{diag}(d) \, A

b starts at zero, so training starts from the pretrained model. A and B are drawn once, for the largest sides of all
adapted weights; a module uses the first columns of A and the first rows of B.

=============  =========================================================================
paper          here
=============  =========================================================================
r              ``rank``
b, d           ``lambda_b`` (out,) and ``lambda_d`` (rank,)
d_init         ``d_initial``
A, B           the buffers ``A`` (rank, in) and ``B`` (out, rank), drawn by ``projection_seed``
=============  =========================================================================

Source: VeRA (arXiv 2310.11454), equation 2, section 3.2 (initial values).

Departs:

- A and B have the bound sqrt(6 / fan_in) of PEFT, and its generator: the same seed gives PEFT's factors.
- Modules of different shapes share slices of one A and one B, as in PEFT; the paper draws a pair per shape.
- Vectors have no weight decay.
- Embeddings are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, host_weight, to_array
from lorascope.adapters.weight_parts import find_host
from lorascope.array_types import Float
from lorascope.methods.field_checks import is_integer, require, require_integer
from lorascope.methods.method import AdapterMethod, reject_embedding
from lorascope.methods.precision import wide_dtype
from lorascope.updates import RandomProjection
from lorascope.updates.random_projection import projections


@dataclass(kw_only=True)
class VeRA(AdapterMethod, name="vera"):
    """Vector-based adaptation: two vectors per module scale shared random factors.

    Parameters
    ----------
    rank : int
        Rank of the random factors.
    d_initial : float
        Initial value of every entry of d.
    projection_seed : int
        Seed of A and B, from 0 to 2^32 - 1; the global generators are not used.
    dropout : float
        Dropout probability on the input of A.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``ls.module_table.match``.
    """

    rank: int = 256
    d_initial: float = 0.1
    projection_seed: int = 0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q", "v")
    lr: float = 2e-2
    head_lr: float = 5e-4

    def __post_init__(self) -> None:
        require_integer(self, 1, "rank")
        require(self, "dropout", "in [0, 1)", 0 <= self.dropout < 1)
        valid = is_integer(self.projection_seed) and 0 <= self.projection_seed < 1 << 32
        require(self, "projection_seed", f"an integer from 0 to {(1 << 32) - 1}", valid)

    @classmethod
    def example(cls) -> VeRA:
        return cls(rank=8, dropout=0.1, lr=1e-1)

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; their largest sides give the shapes of A and B."""
        shapes = [host_weight(find_host(model, name)).shape for name in self.find_targets(model)]
        outer, inner = zip(*shapes, strict=True)
        self._widest = max(inner), max(outer)
        super().attach(model)

    def delta(self, name: str, host: nn.Module) -> VeRADelta:
        """Return the vectors of one module, with its slices of A and B."""
        reject_embedding(self, name, host)
        return VeRADelta(host, self.rank, self.d_initial, (self.projection_seed, *self._widest), self.dropout)


class VeRADelta(Delta):
    """VeRA's update diag(b) B diag(d) A of one linear layer.

    ``projection`` is the seed of A and B, and the largest number of inputs and outputs of all modules.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, host: nn.Module, rank: int, d_initial: float, projection: tuple[int, int, int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        weight = host_weight(host)
        dtype = wide_dtype(weight)
        outer, inner = weight.shape
        A, B = projections(projection[0], rank, *projection[1:])
        self.dropout = float(dropout)
        self.lambda_b = nn.Parameter(torch.zeros(outer, dtype=dtype))
        self.lambda_d = nn.Parameter(torch.full((rank,), d_initial, dtype=dtype))
        # Not stored: the seed gives the same A and B again.
        self.register_buffer("A", torch.tensor(A[:, :inner], dtype=dtype), persistent=False)
        self.register_buffer("B", torch.tensor(B[:outer], dtype=dtype), persistent=False)
        self.projection = (*projection, inner)

    def weight(self) -> Float[Tensor, "out in"]:
        return (self.lambda_b.unsqueeze(1) * self.B) @ (self.lambda_d.unsqueeze(1) * self.A)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        hidden = self.lambda_d * F.linear(F.dropout(x.to(self.A.dtype), self.dropout, self.training), self.A)
        return self.lambda_b * F.linear(hidden, self.B)

    def factors(self) -> dict[str, Tensor]:
        """Return both vectors, and what A and B are drawn from."""
        return {"lambda_b": self.lambda_b, "lambda_d": self.lambda_d, "projection": torch.tensor(self.projection)}

    @property
    def rank(self) -> int:
        return len(self.lambda_d)

    def update(self) -> RandomProjection:
        return RandomProjection.from_factors({name: to_array(factor) for name, factor in self.factors().items()})

    def extra_repr(self) -> str:
        return f"rank={self.rank}, dropout={self.dropout:g}"
