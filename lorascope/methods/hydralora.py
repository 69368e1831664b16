r"""HydraLoRA: one shared A and several B, weighted per token by a router.

.. math::

    y = W_0 x + b + s \sum_i \omega_i(x) B_i A \operatorname{dropout}(x), \qquad
    \omega(x) = \operatorname{softmax}(W_g x), \qquad s = \alpha / r

The experts B_i start at zero and differ only through their gate weights. A router W_g that starts at zero would give
all experts equal gate weights and the same gradient, which leaves a plain LoRA. So W_g starts at random, as A does.

=========  ==========================================================
paper      here
=========  ==========================================================
r          ``rank``
N          ``num_experts``
alpha      ``alpha``
A          the factor ``A`` (rank, in)
B_i        columns of ``B`` = [B_1 ... B_N] (out, num_experts * rank)
W_g        ``router`` (num_experts, in)
omega      ``gates``
=========  ==========================================================

Source: HydraLoRA (arXiv 2404.19245), equations 2 to 4 (the map), section 4.3 and figure 6 (ablations: ``router``
"uniform" is "w/o gate", ``shared_a=False`` is LoRA-Split), appendix B, equations 7 and 8 (the number of experts).

Departs:

- The scale s and one router per module come from the authors' code; the equations have neither.
- W_g is N x in, because it is applied to the token; the paper prints rank x N.
- All experts share one dropout mask, so that A is applied once; the authors' code draws one mask per expert.
- The experts of LoRA-Split are weighted by the same router; the paper does not state how they are combined.
- There is no balance loss, as in the authors' code for language models.
- Embeddings are rejected: they take ids, and a router needs a vector.
- The default rank and learning rates are for small models. The paper does not state alpha: s is 4 by default, that of
  the authors' code at the paper's rank 8 (alpha 32).
- The feed-forward modules are adapted by default, as in the authors' scripts and answers. The paper contradicts this:
  its percentages of parameters match queries and values without routers.
- N is 3 by default, the mean of the paper's runs on one domain. ``ls.choose_num_experts`` selects a number from the
  texts, as in appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapters.delta import to_array
from lorascope.analysis.head_similarity import cosines, head_similarity, mean_of_pairs, update_inner
from lorascope.array_types import Float
from lorascope.methods.field_checks import require_integer, require_literals, require_scaling
from lorascope.methods.hydralora_routing import gate_records, watch
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import AdapterMethod, Step, added_later
from lorascope.methods.precision import wide_dtype
from lorascope.schema import module_table
from lorascope.schema.module_roles import FFN
from lorascope.schema.records import Item, Quantity, Record, Snapshot, register

_PAPER = "HydraLoRA, eq. 3"
register(
    "train HydraLoRA",
    head_norm=Quantity("‖s Bᵢ Aᵢ‖", "", "head", "norm", "norm of the update of one expert at gate weight 1", _PAPER),
    head_cosine=Quantity(
        "cosine of two experts", "", "none", "mean", "cosine between their updates, mean over pairs", _PAPER
    ),
)


@dataclass(kw_only=True)
class HydraLoRA(AdapterMethod, name="hydralora"):
    """Low-rank adaptation with one shared A and several B, weighted per token by a router.

    Parameters
    ----------
    rank : int
        Rank of every expert.
    num_experts : int
        Number of experts per module; ``ls.choose_num_experts(texts)`` selects one. A single expert has no router.
    alpha : float
        Scaling: the update is multiplied by alpha / rank.
    dropout : float
        Dropout probability on the input of A.
    targets : str or tuple of str, optional
        Roles, "all-linear", module names or a regular expression; see ``ls.module_table.match``. By default the
        feed-forward modules: input, output and, if present, gate projection.
    shared_a : bool
        Whether all experts share one A; False gives every expert its own.
    router : {"learned", "uniform"}
        Gate weights computed from the token, or 1 / num_experts for every expert and input.
    gates_every : int
        Steps between two recordings of gate weights on held-out text; step 0 and the last step are always recorded.
        Norms use the mean gate weights of the last recording, so ``step_norm`` at a recording includes their change.
    gate_rows : int
        Number of rows, the first of the validation split, on which gate weights are recorded. A Trainer provides none:
        its updates are evaluated at uniform gates, and ``ls.mean_gates`` records gate weights afterwards.
    """

    rank: int = 4
    num_experts: int = 3
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None
    shared_a: bool = True
    router: Literal["learned", "uniform"] = "learned"
    gates_every: int = 50
    gate_rows: int = field(default=64, metadata=added_later())
    lr: float = 2e-3
    head_lr: float = 2e-3

    def __post_init__(self) -> None:
        require_integer(self, 1, "rank", "num_experts", "gates_every", "gate_rows")
        require_scaling(self)
        require_literals(self)

    @classmethod
    def example(cls) -> HydraLoRA:
        return cls(rank=2, gates_every=1, gate_rows=6, dropout=0.1, lr=1e-2)

    def select_targets(self, modules: pd.DataFrame) -> list[str]:
        """Return the modules to adapt, by default the feed-forward modules."""
        # Not a default, because a role without a module is an error and not every model has a gate projection.
        feed_forward = tuple(role for role in FFN if role in set(modules["role"]))
        return module_table.match(modules, self.targets or feed_forward)

    def delta(self, name: str, host: nn.Module) -> HydraDelta:
        """Return the experts of one module, with a router if it is learned."""
        if isinstance(host, nn.Embedding):
            raise ValueError(
                f"cannot adapt embedding {name!r}: a router needs vectors, not ids. Remove it from targets"
            )
        # The gate weight of a single expert is always 1.
        kind = RoutedDelta if self.router == "learned" and self.num_experts > 1 else HydraDelta
        return kind(host, self.rank, self.num_experts, self.alpha / self.rank, self.dropout, not self.shared_a)

    def after_step(self, step: Step) -> None:
        """Record gate weights if due, before the state and the norms of this step are saved with them."""
        self._recorded: list[Item] = []
        if step.finished % self.gates_every == 0 or step.last:
            self._recorded = list(self._record_gates(step))

    def records(self, step: Step) -> Iterable[Item]:
        """Return gate weights on held-out text and the norm of every expert; at start and end also gates by domain."""
        if step.finished == 0:
            self._recorded = list(self._record_gates(step))
        return self._recorded

    def _record_gates(self, step: Step) -> Iterable[Item]:
        has_snapshots = step.finished == 0 or step.last
        routed = {name: delta for name, delta in self._deltas.items() if isinstance(delta, RoutedDelta)}
        if routed and step.shows_text:
            text = step.held_out(self.gate_rows)
            gates = {name: delta.gates for name, delta in routed.items()}
            sizes = {name: delta.head_sizes for name, delta in routed.items()}
            routings = watch(step.model, gates, text.batch, lambda: step.loss(text.batch), sizes)
            for name, routing in routings.items():
                # Norms, saved states and updates use these gate weights until the next recording.
                routed[name].mean_gates_.copy_(torch.from_numpy(routing.mean))
                yield from gate_records(name, routing, text.groups, has_snapshots)
        for name, delta in self._deltas.items():
            factors = delta.factors()
            A, B = to_array(factors["A"]), to_array(factors["B"])
            inner = update_inner(A, B)  # of all pairs of experts, so its diagonal has their squared norms
            yield Record("head_norm", delta.scale * np.sqrt(np.diagonal(inner)), name)
            if delta.number > 1:
                yield Record("head_cosine", mean_of_pairs(cosines(inner)), name)
            if has_snapshots:
                yield Snapshot(f"{name}/head_similarity", head_similarity(B), ("head", "other_head"))

    def describe(self) -> dict[str, Any]:
        """Return the common facts, and the number of experts."""
        return super().describe() | {"num_experts": self.num_experts}


class HydraDelta(LoRADelta):
    """HydraLoRA's experts with uniform gate weights: the update scale * mean of B_i A.

    ``split`` gives each of the ``number`` experts of ``rank`` its own A; they are then stacked along the rows of ``A``.
    """

    mean_gates_: Tensor

    def __init__(
        self,
        host: nn.Module,
        rank: int,
        number: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        split: bool = False,
    ) -> None:
        rows = number * rank if split else rank
        super().__init__(host, rows, scale, dropout, columns=number * rank)
        self.number = number
        # Logits narrower than float32 would round the gate weights.
        self.register_buffer("mean_gates_", torch.full((number,), 1 / number, dtype=wide_dtype(self.A)))

    def gates(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch heads"]:
        """Return the gate weights of the experts, which sum to 1."""
        return self.mean_gates_.expand(*x.shape[:-1], -1)

    def weight(self, gates: Float[Tensor, "heads"] | None = None) -> Float[Tensor, "out in"]:
        """Return the update at these gate weights, by default the uniform ones."""
        gates = self.mean_gates_ if gates is None else gates
        columns = gates.repeat_interleave(self.B.shape[1] // self.number).to(self.B.dtype)
        # B has the columns of all experts, so an A that they share is repeated.
        A = self.A.repeat(self.B.shape[1] // self.rank, 1)
        return self.scale * (self.B * columns) @ A

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch columns"]:
        """Return the input of B: A x times the gate weight of each expert."""
        hidden = super().hidden(x)
        # One A x for all experts, or one per expert.
        by_expert = hidden.unflatten(-1, (-1, self.B.shape[1] // self.number))
        return (self.gates(x).to(hidden.dtype).unsqueeze(-1) * by_expert).flatten(-2)

    def head_sizes(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch heads"]:
        """Compute the norm that each expert adds to the output at gate weight 1, without dropout: ``|s B_i A x|``.

        The computation uses B_i^T B_i, so that the output of no expert is formed.
        """
        wide = self.mean_gates_.dtype
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.linear(x.to(wide), self.A.to(wide)).double().unflatten(-1, (-1, self.B.shape[1] // self.number))
            B = self.B.double().unflatten(1, (self.number, -1))
            gram = torch.einsum("ohr,ohs->hrs", B, B)
            hidden = hidden.expand(*x.shape[:-1], *gram.shape[:2])
            squares = torch.einsum("...hr,hrs,...hs->...h", hidden, gram, hidden)
        return self.scale * squares.clamp(min=0).sqrt()  # rounding can make a small square negative

    def factors(self) -> dict[str, Tensor]:
        """Return B as (heads, out, rank), A as (rank, in) or (heads, rank, in), and the gate weights of the update."""
        A = self.A.unflatten(0, (self.number, -1)) if len(self.A) == self.B.shape[1] else self.A
        return {"A": A, "B": self.B.unflatten(1, (self.number, -1)).transpose(0, 1), "gates": self.mean_gates_}

    def extra_repr(self) -> str:
        return f"heads={self.number}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class RoutedDelta(HydraDelta):
    """HydraLoRA's experts weighted by a router, without a single update matrix. Parameters: see ``HydraDelta``."""

    linear = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.router = nn.Parameter(torch.empty(self.number, self.A.shape[1], dtype=self.mean_gates_.dtype))
        # The distribution of A, as in the authors' code: a router of zeros would keep all experts equal.
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    def gates(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch heads"]:
        """Compute softmax(W_g x), in float32 or wider also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.router.dtype), self.router).softmax(-1)

    def weight(self, gates: Float[Tensor, "heads"] | None = None) -> Float[Tensor, "out in"]:
        """Return the update at these gate weights, without which there is no single matrix."""
        if gates is None:
            raise ValueError("cannot form a routed update: it depends on its input. Pass gates, such as mean_gates_")
        return super().weight(gates)

    def factors(self) -> dict[str, Tensor]:
        return super().factors() | {"router": self.router}
