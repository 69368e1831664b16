"""HydraLoRA: one A for all input and several B, mixed anew for every token by a router.

    W_0 x + b + s sum_i w_i(x) B_i A dropout(x),    w(x) = softmax(W_g x),    s = alpha / rank

The heads B_i start at zero and are told apart by the router's weights alone: a router that starts at zero weighs all
heads alike, gives all the same gradient, and leaves a plain LoRA. So W_g starts at random, as A does.

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
"uniform" is "w/o gate", ``shared_a=False`` is LoRA-Split), appendix B, equations 7 and 8 (the number of heads).

Departs: the scale s and one router a module are the authors' code's, the equations have neither; the paper prints W_g
as rank x N, but applies it to the token, which has ``in`` entries. Dropout has one mask for all heads, so that A is
applied once; the code draws one a head. The heads of LoRA-Split are mixed by the same router: the paper does not say
how they are put together. No balance loss, as in the code for language models. An embedding is refused: it looks ids
up, and a router needs a vector. The default rank and rates are for small models; N is 3, the mean of the paper's runs
on one domain, and ``analysis.head_count`` finds a number in the texts, as appendix B does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, attach, host_weight, to_array
from lorascope.analysis.head_similarity import cosines, head_similarity, mean_of_pairs, update_inner
from lorascope.methods.base import Method, Step, added_later, train_adapters
from lorascope.methods.hydralora_routing import gate_records, watch
from lorascope.schema import module_table
from lorascope.schema.deprecation import accept_old_fields, formerly
from lorascope.schema.module_roles import FFN
from lorascope.schema.records import Item, Quantity, Record, Snapshot, register
from lorascope.updates.factor_formats import update_from
from lorascope.updates.low_rank import Dense, LowRank

_PAPER = "HydraLoRA, eq. 3"
register("head_norm", Quantity("‖s Bᵢ Aᵢ‖", "", "head", "norm", "norm of what one head would add, ungated", _PAPER))
register(
    "head_cosine", Quantity("cosine of two heads", definition="between their updates, mean over pairs", source=_PAPER)
)


@accept_old_fields
@dataclass(kw_only=True)
class HydraLoRA(Method, name="hydralora"):
    """Low-rank adaptation with one A and several B, mixed for every token by a router.

    Parameters
    ----------
    rank : int
        Components of every head.
    num_experts : int
        Heads of every module; ``ls.choose_num_experts(texts)`` finds a number. A single one needs no router.
    alpha : float
        The update is scaled by alpha / rank.
    dropout : float
        Share of the input dropped on the way into A.
    targets : str or tuple of str, optional
        Roles, "all-linear", module names or a regular expression; see ``names.match``. By default the feed-forward
        part: input, output, and the gate where there is one.
    shared_a : bool
        One A for all heads; False for an A each.
    router : {"learned", "uniform"}
        Gates by the token, or 1 / num_experts for each head whatever the input.
    gates_every : int
        Steps between two looks at the gates on held-out text; step 0 and the last are always looked at. Norms are those
        of the update at the mean gates of the last look, so that ``step_norm`` at a look holds what gates moved, too.
    gate_rows : int
        Rows of the validation split that gates are looked at on, its first ones. A Trainer shows none: its updates are
        at even gates, and ``ls.mean_gates`` looks afterwards.
    """

    rank: int = 4
    num_experts: int = field(default=3, metadata=formerly("number"))
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None
    shared_a: bool = field(default=True, metadata=formerly("heads", {"shared": True, "split": False}))
    router: str = "learned"
    gates_every: int = 50
    gate_rows: int = field(default=64, metadata=added_later())
    lr: float = 2e-3
    head_lr: float = 2e-3

    def __post_init__(self) -> None:
        for name in ("rank", "num_experts", "gates_every", "gate_rows"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} {value} is too small: it must be 1 or more")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha {self.alpha} gives no scale: it must be a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is no share of the input to leave out: it must lie in [0, 1)")
        if not isinstance(self.shared_a, bool):
            raise ValueError(f"shared_a must be True or False, got {self.shared_a!r}")
        if self.router not in ("learned", "uniform"):
            raise ValueError(f"router {self.router!r} is unknown: 'learned' or 'uniform'")

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; leave adapters and head trainable."""
        description = module_table.describe(model)
        targets = self.targets or tuple(role for role in FFN if role in set(description["role"]))
        self._deltas = {name: self._hydra_delta(name, model) for name in module_table.match(description, targets)}
        attach(model, self._deltas)
        train_adapters(model)
        self._looked: list[Item] = []

    def _hydra_delta(self, name: str, model: nn.Module) -> HydraDelta:
        host = model.get_submodule(name)
        if isinstance(host, nn.Embedding):
            raise ValueError(
                f"{name!r} is an embedding: it takes ids, and a router needs a vector; adapt linear layers"
            )
        kind = RoutedDelta if self.router == "learned" and self.num_experts > 1 else HydraDelta
        return kind(host, self.rank, self.num_experts, self.alpha / self.rank, self.dropout, not self.shared_a)

    def after_step(self, step: Step) -> None:
        """Look at the gates where it is time, so that whatever is saved or recorded of this step goes by them."""
        self._looked = []
        if step.finished % self.gates_every == 0 or step.last:
            self._looked = list(self._record_gates(step))

    def records(self, step: Step) -> Iterable[Item]:
        """Gates on held-out text and the size of every head; at the start and the end also gates by domain."""
        if step.finished == 0:
            self._looked = list(self._record_gates(step))
        return self._looked

    def _record_gates(self, step: Step) -> Iterable[Item]:
        kept = step.finished == 0 or step.last
        routed = {name: delta for name, delta in self._deltas.items() if isinstance(delta, RoutedDelta)}
        if routed and step.shows_text:
            held = step.held_out(self.gate_rows)
            gates = {name: delta.gates for name, delta in routed.items()}
            sizes = {name: delta.head_sizes for name, delta in routed.items()}
            seen = watch(step.model, gates, held.batch, lambda: step.loss(held.batch), sizes)
            for name, delta in routed.items():
                delta.mean_gates_.copy_(torch.from_numpy(seen[name].mean))
                yield from gate_records(name, seen[name], held.groups, kept)
        for name, heads in self._deltas.items():
            yield from _head_records(name, heads, kept)


def _head_records(name: str, delta: HydraDelta, kept: bool) -> Iterable[Item]:
    factors = {factor: to_array(value) for factor, value in delta.factors().items()}
    inner = update_inner(factors["A"], factors["B"])
    yield Record("head_norm", delta.scale * np.sqrt(np.diagonal(inner)), name)
    if delta.number > 1:
        yield Record("head_cosine", mean_of_pairs(cosines(inner)), name)
    if kept:
        yield Snapshot(f"{name}/head_similarity", head_similarity(factors["B"]), ("head", "other_head"))


class HydraDelta(Delta):
    """Heads that are mixed evenly, whatever the input: the update scale * mean of B_i A.

    Parameters
    ----------
    host : Module
        A linear layer: gives shape, dtype and device of the factors.
    rank, number : int
        Components of a head, and heads.
    scale : float
    dropout : float
        On the input of A.
    split : bool
        Does every head have an A of its own? They stand below each other then.
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
        super().__init__()
        weight = host_weight(host)
        out_features, in_features = weight.shape
        self.number, self.scale, self.dropout = number, float(scale), float(dropout)
        self.A = nn.Parameter(torch.empty(rank * (number if split else 1), in_features, dtype=weight.dtype))
        self.B = nn.Parameter(torch.zeros(out_features, number * rank, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        # Logits in less than float32 would round the gates.
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("mean_gates_", torch.full((number,), 1 / number, dtype=wide))

    def gates(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch heads"]:
        """Weights of the heads, which sum to 1."""
        return self.mean_gates_.expand(*x.shape[:-1], -1)

    def weight(self, gates: Float[Tensor, "heads"] | None = None) -> Float[Tensor, "out in"]:
        """The update at these gates, the even ones by default."""
        gates = self.mean_gates_ if gates is None else gates
        columns = gates.repeat_interleave(self.B.shape[1] // self.number).to(self.B.dtype)
        below = self.A.repeat(self.B.shape[1] // self.rank, 1)
        return self.scale * (self.B * columns) @ below

    def gated_components(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch columns"]:
        """What meets the columns of B: A x under the gate of each head."""
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.A)
        parts = hidden.unflatten(-1, (-1, self.B.shape[1] // self.number))  # one for all heads, or one each
        return (self.gates(x).to(hidden.dtype).unsqueeze(-1) * parts).flatten(-2)

    def head_sizes(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch heads"]:
        """Norm of what each head would add to the output, ungated and without dropout: |s B_i A x|.

        By B_i^T B_i, so that no head's output is formed.
        """
        wide = self.mean_gates_.dtype
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.linear(x.to(wide), self.A.to(wide)).double().unflatten(-1, (-1, self.B.shape[1] // self.number))
            B = self.B.double().unflatten(1, (self.number, -1))
            gram = torch.einsum("ohr,ohs->hrs", B, B)
            hidden = hidden.expand(*x.shape[:-1], *gram.shape[:2])
            squares = torch.einsum("...hr,hrs,...hs->...h", hidden, gram, hidden)
        return self.scale * squares.clamp(min=0).sqrt()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.scale * F.linear(self.gated_components(x), self.B)

    def affine(
        self, x: Float[Tensor, "*batch in"], W: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """As the base class, but all heads are added onto the host's output in one product."""
        output, mixed = F.linear(x, W, b), self.gated_components(x)
        flat = torch.addmm(output.view(-1, W.shape[0]), mixed.view(-1, mixed.shape[-1]), self.B.T, alpha=self.scale)
        return flat.view(output.shape)

    def factors(self) -> dict[str, Tensor]:
        """B as (heads, out, rank), A as (rank, in) or (heads, rank, in), and the gates at which they make an update."""
        A = self.A.unflatten(0, (self.number, -1)) if len(self.A) == self.B.shape[1] else self.A
        return {"A": A, "B": self.B.unflatten(1, (self.number, -1)).transpose(0, 1), "gates": self.mean_gates_}

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def update(self) -> LowRank | Dense:
        """At the mean gates of the last look."""
        return update_from({name: to_array(part) for name, part in self.factors().items()}, self.scale, self.linear)

    def extra_repr(self) -> str:
        return f"heads={self.number}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class RoutedDelta(HydraDelta):
    """Heads that a router mixes by the input: there is no single matrix. Parameters as of ``HydraDelta``."""

    linear = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.router = nn.Parameter(torch.empty(self.number, self.A.shape[1], dtype=self.mean_gates_.dtype))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    def gates(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch heads"]:
        """softmax(W_g x), in float32 under autocast as well."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.router.dtype), self.router).softmax(-1)

    def weight(self, gates: Float[Tensor, "heads"] | None = None) -> Float[Tensor, "out in"]:
        """The update at these gates.

        Raises
        ------
        ValueError
            No gates are given: without them there is no single matrix.
        """
        if gates is None:
            raise ValueError("a routed update depends on its input: give weight(gates=...), such as mean_gates_")
        return super().weight(gates)

    def factors(self) -> dict[str, Tensor]:
        return super().factors() | {"router": self.router}
