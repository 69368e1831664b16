r"""LoRA: a frozen weight plus a trained product of two low-rank factors.

.. math::

    W = W_0 + s B A, \qquad s = \alpha / r, \qquad y = W_0 x + b + s B A \operatorname{dropout}(x)

B starts at zero, so training starts from the pretrained model and the first gradient of A is zero.

=========  ==========================================================
paper      here
=========  ==========================================================
r          ``rank``
alpha      ``alpha``
A, B       the factors ``A`` (rank, in), ``B`` (out, rank)
=========  ==========================================================

Source: LoRA (arXiv 2106.09685), section 4.1; rates of table 9 (RoBERTa-base on GLUE). ``rslora``: Kalajdzievski (arXiv
2312.03732), s = alpha / sqrt(rank).

Departs:

- A is Kaiming-uniform, U(-1/sqrt(in), 1/sqrt(in)), as in the authors' code and in PEFT; the paper has a Gaussian of
  unstated standard deviation.
- On an embedding A is zero and B standard normal, as in the authors' code and in PEFT. The gain ``|B a| / |a|``
  is then sqrt(3 out) times that of the A of a linear layer; ``embedding_init="linear"`` divides B by this factor.
- On a fused matrix of queries, keys and values, such as GPT-2's ``c_attn``, ("q", "v") adapts its rows of queries and
  values only, as in the paper; PEFT adapts the whole matrix, as "qkv" does here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, host_weight, to_array
from lorascope.array_types import Float
from lorascope.methods.field_checks import is_integer, require_integer, require_literals, require_scaling
from lorascope.methods.method import AdapterMethod, added_later
from lorascope.methods.precision import wide_dtype
from lorascope.schema import module_table
from lorascope.updates import Update, from_factors


@dataclass(kw_only=True)
class LoRA(AdapterMethod, name="lora"):
    """Low-rank adaptation with one rank for all modules, or a rank per module.

    Parameters
    ----------
    rank : int or mapping module name -> int
        Rank of all targets, or of each module by name. A mapping replaces ``targets``; rank 0 leaves a module
        unchanged.
    alpha : float
        Scaling: the update is multiplied by alpha / rank.
    dropout : float
        Dropout probability on the input of A.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``ls.module_table.match``.
    rslora : bool
        Scale by alpha / sqrt(rank) instead.
    init_seed : int or None
        Seed of the initial factors, drawn with a separate generator, so that runs on other data or in another order
        can share them. They are the factors that a run with this ``seed`` draws. None uses the run's seed.
    embedding_init : {"peft", "linear"}
        Standard deviation of the initial B of an embedding: 1, or 1 / sqrt(3 out), which gives it the gain of the
        initial A of a linear layer.
    """

    rank: int | Mapping[str, int] = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q", "v")
    rslora: bool = False
    init_seed: int | None = field(default=None, metadata=added_later())
    embedding_init: Literal["peft", "linear"] = field(default="peft", metadata=added_later())
    lr: float = 5e-4
    head_lr: float = 5e-4

    def __post_init__(self) -> None:
        if isinstance(self.rank, Mapping):
            for module, rank in self.rank.items():
                if not is_integer(rank) or rank < 0:
                    raise ValueError(f"rank of {module!r} must be an integer >= 0, got {rank}")
        else:
            require_integer(self, 1, "rank")
        require_integer(self, 0, "init_seed")
        require_scaling(self)
        require_literals(self)

    @classmethod
    def example(cls) -> LoRA:
        return cls(rank=2, rslora=True, dropout=0.1, lr=1e-2)

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets, with factors drawn by ``init_seed``; leave adapters and head trainable."""
        self._generator = None if self.init_seed is None else torch.Generator().manual_seed(self.init_seed)
        super().attach(model)

    def named_targets(self) -> tuple[str, ...]:
        """Return the targets, or the modules with a rank in the mapping."""
        return tuple(self.rank) if isinstance(self.rank, Mapping) else super().named_targets()

    def select_targets(self, modules: pd.DataFrame) -> list[str]:
        """Return the modules to adapt: the targets, or those with a rank in the mapping."""
        if not isinstance(self.rank, Mapping):
            return super().select_targets(modules)
        matched = module_table.match(modules, tuple(self.rank))
        if not set(matched) <= self.rank.keys():  # a role or a pattern
            unmatched = ", ".join(repr(name) for name in self.rank if name not in matched)
            raise ValueError(f"rank must map names of modules to ranks, got {unmatched}")
        names = [name for name in matched if self.rank[name]]
        if not names:
            raise ValueError("rank must be >= 1 for at least one module, got 0 for all")
        return names

    def delta(self, name: str, host: nn.Module) -> LoRADelta:
        """Return B A of one module, scaled by its rank."""
        delta = LoRADelta(host, *self.factor_options(name), self._generator)
        if isinstance(host, nn.Embedding) and self.embedding_init == "linear":
            # A linear A has variance 1 / (3 in); see Departs for the gains.
            with torch.no_grad():
                delta.B.div_(math.sqrt(3 * len(delta.B)))
        return delta

    def factor_options(self, name: str) -> tuple[int, float, float]:
        """Return rank, scale and dropout of a module's factors."""
        rank = self.rank[name] if isinstance(self.rank, Mapping) else self.rank
        divisor = math.sqrt(rank) if self.rslora else rank
        return rank, self.alpha / divisor, self.dropout


class LoRADelta(Delta):
    """LoRA's update scale * B A of one module, whose host sets shape and dtype of the factors.

    A host of 16 bits has factors in float32, as in PEFT, because 16 bits would round small steps away.
    ``dropout`` is the dropout probability on the input of A; it is not used on an embedding. Initial values come from
    ``generator``, by default the global one. ``columns``, the number of columns of B, is the rank by default.
    """

    def __init__(
        self,
        host: nn.Module,
        rank: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        columns: int | None = None,
    ) -> None:
        super().__init__()
        weight = host_weight(host)
        dtype = wide_dtype(weight)
        self.scale, self.dropout = float(scale), float(dropout)
        self.padding: int | None = host.padding_idx if isinstance(host, nn.Embedding) else None
        self.A = nn.Parameter(torch.zeros(rank, weight.shape[1], dtype=dtype))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], columns or rank, dtype=dtype))
        if isinstance(host, nn.Embedding):
            # A is the factor that starts at zero, as in PEFT.
            nn.init.normal_(self.B, generator=generator)
        else:
            # This slope gives U(-1/sqrt(in), 1/sqrt(in)), as in PEFT.
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)

    @property
    def right(self) -> Float[Tensor, "rank in"]:
        """Factor applied to the input."""
        return self.A

    @property
    def left(self) -> Float[Tensor, "out columns"]:
        """Factor applied to ``hidden``."""
        return self.B

    def weight(self) -> Float[Tensor, "out in"]:
        return self.scale * (self.B @ self.right)

    def hidden(self, x: Tensor) -> Float[Tensor, "*batch columns"]:
        """Return A x, with dropout."""
        if x.is_floating_point():
            return F.linear(F.dropout(x.to(self.A.dtype), self.dropout, self.training), self.right)
        return F.embedding(x, self.right.T, self.padding)  # the input has ids, for which A x is a lookup

    def forward(self, x: Tensor) -> Float[Tensor, "*batch out"]:
        return self.scale * F.linear(self.hidden(x), self.left)

    def affine(
        self, x: Float[Tensor, "*batch in"], W: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """As in the base class, but ``addmm`` adds the second product to the host's output, which saves one pass."""
        output, hidden, B = F.linear(x, W, b), self.hidden(x), self.left
        # The sum is rounded once if the host is narrower.
        if hidden.dtype != output.dtype:
            return (output + F.linear(hidden, B) * self.scale).to(output.dtype)
        rows, hidden_rows = output.view(-1, W.shape[0]), hidden.view(-1, hidden.shape[-1])
        # A copy of the output took a quarter of the time in a wide layer of MiniLM. Gradients need it, and autocast.
        if not torch.is_grad_enabled() and rows.dtype == B.dtype:
            rows.addmm_(hidden_rows, B.T, alpha=self.scale)
            return output
        return torch.addmm(rows, hidden_rows, B.T, alpha=self.scale).view(output.shape)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def update(self) -> Update:
        arrays = {name: to_array(factor) for name, factor in self.factors().items()}
        return from_factors(arrays, self.scale, self.linear)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
