"""LoRA: a frozen weight plus a trained product of two thin matrices.

    W = W_0 + s B A,    s = alpha / rank,    y = W_0 x + b + s B A dropout(x)

B starts at zero, so training starts at the pre-trained model, and its first step moves B alone.

=========  ==========================================================
paper      here
=========  ==========================================================
r          ``rank``
alpha      ``alpha``
A, B       the factors ``A`` (rank, in), ``B`` (out, rank)
=========  ==========================================================

Source: LoRA (arXiv 2106.09685), section 4.1; rates of table 9 (RoBERTa-base on GLUE). ``rslora``: Kalajdzievski (arXiv
2312.03732), s = alpha / sqrt(rank).

Departs: A is Kaiming-uniform, U(-1/sqrt(in), 1/sqrt(in)), as in the authors' code and in PEFT; the paper says Gaussian
and gives no deviation. On an embedding A is zero and B standard normal, as in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, attach, host_weight, to_array
from lorascope.methods.base import Method, added_later, train_adapters
from lorascope.schema import module_table
from lorascope.updates.low_rank import LowRank


@dataclass(kw_only=True)
class LoRA(Method, name="lora"):
    """Low-rank adaptation with the same rank everywhere, or one chosen for each module.

    Parameters
    ----------
    rank : int or mapping module name -> int
        A mapping names the modules itself, ``targets`` is then not asked; rank 0 leaves a module alone.
    alpha : float
        The update is scaled by alpha / rank.
    dropout : float
        Share of the input dropped on the way into A.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``names.match``.
    rslora : bool
        Scale by alpha / sqrt(rank).
    init_seed : int or None
        Draws the first factors by a generator of their own, so that runs on other text, or in another order, can share
        them: those that a run of this ``seed`` would draw. None takes the run's seed.
    """

    rank: int | Mapping[str, int] = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q", "v")
    rslora: bool = False
    init_seed: int | None = field(default=None, metadata=added_later())
    lr: float = 5e-4
    head_lr: float = 5e-4

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; leave adapters and head trainable."""
        generator = None if self.init_seed is None else torch.Generator().manual_seed(self.init_seed)
        ranks = self._module_ranks(model)
        attach(
            model, {name: self._lora_delta(model.get_submodule(name), rank, generator) for name, rank in ranks.items()}
        )
        train_adapters(model)

    def _module_ranks(self, model: nn.Module) -> dict[str, int]:
        description = module_table.describe(model)
        if isinstance(self.rank, int):
            return dict.fromkeys(module_table.match(description, self.targets), self.rank)
        ranks = {name: self.rank[name] for name in module_table.match(description, tuple(self.rank)) if self.rank[name]}
        if not ranks:
            raise ValueError("every rank is 0: nothing would be adapted")
        return ranks

    def _lora_delta(self, host: nn.Module, rank: int, generator: torch.Generator | None) -> LoRADelta:
        if rank < 1:
            raise ValueError(f"rank {rank} is no rank: it counts components, 1 or more")
        scale = self.alpha / (math.sqrt(rank) if self.rslora else rank)
        return LoRADelta(host, rank, scale, self.dropout, generator)


class LoRADelta(Delta):
    """The update scale * B A of one module.

    Parameters
    ----------
    host : Module
        Gives shape, dtype and device of the factors.
    rank : int
    scale : float
    dropout : float
        On the input of A; an embedding has none.
    generator : Generator, optional
        Of the initial values, in place of the global one.
    """

    def __init__(
        self,
        host: nn.Module,
        rank: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        weight = host_weight(host)
        out_features, in_features = weight.shape
        self.scale = float(scale)
        self.dropout = float(dropout)
        self.padding: int | None = host.padding_idx if isinstance(host, nn.Embedding) else None
        self.A = nn.Parameter(torch.zeros(rank, in_features, dtype=weight.dtype))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=weight.dtype))
        if isinstance(host, nn.Embedding):
            nn.init.normal_(self.B, generator=generator)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)

    @property
    def right(self) -> Float[Tensor, "rank in"]:
        """The factor that meets the input."""
        return self.A

    def weight(self) -> Float[Tensor, "out in"]:
        return self.scale * (self.B @ self.right)

    def forward(self, x: Tensor) -> Float[Tensor, "*batch out"]:
        if x.is_floating_point():
            hidden = F.linear(F.dropout(x, self.dropout, self.training), self.right)
        else:
            hidden = F.embedding(x, self.right.T, self.padding)
        return self.scale * F.linear(hidden, self.B)

    def affine(
        self, x: Float[Tensor, "*batch in"], W: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """As the base class, but the second product adds onto the host's output: one pass over it less."""
        output = F.linear(x, W, b)
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.right)
        flat = torch.addmm(output.view(-1, W.shape[0]), hidden.view(-1, self.A.shape[0]), self.B.T, alpha=self.scale)
        return flat.view(output.shape)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def update(self) -> LowRank:
        return LowRank(to_array(self.B), to_array(self.A), self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
