"""AdaLoRA: adapters in the form of a singular value decomposition, whose least important components are masked.

    W = W_0 + c P diag(lambda) Q,    c = alpha / r_0,    L = C + gamma R(P, Q)
    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3
    I = |w dL/dw|,    Ibar <- beta1 Ibar + (1 - beta1) I,    Ubar <- beta2 Ubar + (1 - beta2) |I - Ibar|
    s = Ibar Ubar,    S_i = s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij)

Every DeltaT steps after t_i the components of all matrices are ranked together by S, and all but the best b(t) lose
their lambda. P and Q stay and lambda goes on training, so a component can come back, until the last t_f steps begin.

=============  =====================================================
paper          here
=============  =====================================================
P, lambda, Q   the factors ``B`` (out, rank), ``diagonal`` and ``A``
r_0, b_T       ``init_rank``; ``target_rank`` for each matrix
t_i, t_f       ``initial_steps``, ``final_steps``
DeltaT         ``mask_every``
R              ``penalty``
=============  =====================================================

Source: AdaLoRA (arXiv 2303.10512), equations 3 (form), 4 (penalty), 9 (importance), 10 to 13 (sensitivity and
uncertainty), 14 (budget); gamma, alpha and the head's rate from its tables 8 and 10 and the authors' code.

Departs: where paper and authors' code differ, the code is followed. R is the mean of |P^T P - I|_F and |Q Q^T - I|_F
over all factors; ``penalty="sum-square"`` is the paper's sum of squares. I is of the weights after the optimizer's step
and the gradient before it; ``scores="before"`` is the paper's order. Equation 14 is printed with t - t_i - t_f above
the line, which would begin beyond b_0. c is alpha / (r_0 + 1e-5) whatever is masked. P and Q are normal of deviation
0.02. Unlike the code, which masks all that is tied with the threshold, exactly b components stay: by score, then order
of modules, then index; b_T holds from step T - t_f on, DeltaT or not, and at the last step even if t_f is 0; an
alpha of zero is refused; and an embedding may be adapted too. The rate is ten times the paper's 1e-3, at which lambda,
that begins at zero, gets nowhere in a run of a hundred steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lorascope.adapters.delta import attach, to_array
from lorascope.methods.base import Method, Step, train_adapters
from lorascope.methods.lora import LoRADelta
from lorascope.schema import module_table
from lorascope.schema.records import Item, Quantity, Record, register
from lorascope.updates.low_rank import LowRank

# Of every component, in the order in which they are computed.
_SCORES = {
    "importance_left": ("importance of P", "mean of s over the column of P", 9),
    "importance_lambda": ("importance of λ", "s(lambda)", 9),
    "importance_right": ("importance of Q", "mean of s over the row of Q", 9),
    "sensitivity": ("sensitivity of λ", "moving average of |w dL/dw|", 11),
    "uncertainty": ("uncertainty of λ", "moving average of how far |w dL/dw| is from its moving average", 12),
}
for _name, (_label, _meaning, _equation) in _SCORES.items():
    register(_name, Quantity(_label, index="rank_id", definition=_meaning, source=f"AdaLoRA, eq. {_equation}"))
register("kept", Quantity("kept", index="rank_id", pool="sum", definition="1 for a component in use, else 0"))
register("penalty", Quantity("penalty", definition="R(P, Q), without its weight gamma", source="AdaLoRA, eq. 4"))

Tensors = list[Tensor]


@dataclass(kw_only=True)
class AdaLoRA(Method, name="adalora"):
    """Low-rank adaptation that allots a budget of ranks by importance while it trains.

    Parameters
    ----------
    init_rank : int
        Components of every module at the start.
    target_rank : float
        Components that stay in the end, on average over the modules.
    alpha : float
        The update is scaled by alpha / init_rank throughout.
    dropout : float
        Share of the input dropped on the way into A.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``names.match``. "all-linear" has gates and
        cross-attention too.
    initial_steps : int, optional
        Steps before the budget falls; a tenth of the run by default.
    final_steps : int, optional
        Steps in which the choice is fixed; three tenths of the run by default.
    mask_every : int, optional
        Steps between two choices; a hundredth of the run by default.
    beta1, beta2 : float
        Memory of the moving averages of sensitivity and uncertainty.
    gamma : float
        Weight of the orthogonality penalty.
    penalty : {"mean-norm", "sum-square"}
        That of the authors' code, or the paper's.
    scores : {"after", "before"}
        Sensitivity by the weights after the optimizer's step, or before it.
    """

    init_rank: int = 12
    target_rank: float = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q", "k", "v", "o", "ffn_in", "ffn_out")
    initial_steps: int | None = None
    final_steps: int | None = None
    mask_every: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.1
    penalty: Literal["mean-norm", "sum-square"] = "mean-norm"
    scores: Literal["after", "before"] = "after"
    lr: float = 1e-2
    head_lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.init_rank < 1:
            raise ValueError(f"init_rank {self.init_rank} is no rank: it counts components, 1 or more")
        if not 0 <= self.target_rank <= self.init_rank:
            raise ValueError(f"target_rank {self.target_rank} must lie between 0 and init_rank, {self.init_rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha {self.alpha} leaves no update: it must be above 0")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"{name} {beta} is no weight of a moving average: it must lie between 0 and 1")
        for name, least in (("initial_steps", 0), ("final_steps", 0), ("mask_every", 1)):
            if (steps := getattr(self, name)) is not None and steps < least:
                raise ValueError(f"{name} {steps} is too small: it must be {least} or more")
        for name, one, other in (("penalty", "mean-norm", "sum-square"), ("scores", "after", "before")):
            if (choice := getattr(self, name)) not in (one, other):
                raise ValueError(f"{name} {choice!r} is unknown: it must be {one!r} or {other!r}")

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; leave adapters and head trainable."""
        chosen = module_table.match(module_table.describe(model), self.targets)
        sizes = (self.init_rank, self.alpha / (self.init_rank + 1e-5), self.dropout)
        self._deltas = {name: AdaLoRADelta(model.get_submodule(name), *sizes) for name in chosen}
        attach(model, self._deltas)
        train_adapters(model)
        # P, lambda, Q of one module after the other.
        self._weights: Tensors = [weight for d in self._deltas.values() for weight in (d.B, d.diagonal, d.A)]
        self.sensitivity_ = [
            torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in self._weights
        ]
        self.uncertainty_ = [s.clone() for s in self.sensitivity_]

    def schedule(self, total: int) -> Schedule:
        """The budget in a run of so many steps; a ValueError where they are too few for its phases."""
        initial = round(0.1 * total) if self.initial_steps is None else self.initial_steps
        final = round(0.3 * total) if self.final_steps is None else self.final_steps
        every = max(1, total // 100) if self.mask_every is None else self.mask_every
        if initial + final >= total:
            phases = f"initial_steps {initial} and final_steps {final}"
            raise ValueError(f"{phases} leave no step of {total} for the budget to fall: take fewer, or more steps")
        modules = len(self._deltas)
        return Schedule(total, initial, final, every, modules * self.init_rank, round(modules * self.target_rank))

    def after_backward(self, step: Step) -> None:
        """Add the penalty's gradient."""
        penalty = orthogonality(self._weights[0::3], self._weights[2::3], self.penalty)
        (self.gamma * penalty).backward()
        self._penalty = penalty.detach()
        if self.scores == "before":
            self._before = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Score until the choice is fixed, choose where it is due, and mask."""
        schedule = self.schedule(step.total)
        deltas = self._deltas.values()
        if step.index < schedule.fixed:
            weights = self._before if self.scores == "before" else self._weights
            gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
            smooth(self.sensitivity_, self.uncertainty_, weights, gradients, (self.beta1, self.beta2))
        if schedule.chooses(step.index) or step.last:
            self._parts = importance(self.sensitivity_, self.uncertainty_)
        if schedule.chooses(step.index):
            kept = most_important(self._parts.sum(0), schedule.budget(step.index))
            torch._foreach_copy_([d.kept for d in deltas], list(kept))
        if schedule.masks(step.index):
            kept = torch.stack([d.kept for d in deltas])
            masked = torch.stack([d.diagonal for d in deltas]).masked_fill_(~kept[..., None], 0)
            torch._foreach_copy_([d.diagonal for d in deltas], list(masked))

    @torch.no_grad()
    def records(self, step: Step) -> Iterable[Item]:
        """Ranks and budget at the start, at every choice and at the end; then also what they rest on."""
        schedule = self.schedule(step.total)
        if step.finished and not (schedule.chooses(step.index) or step.last):
            return
        kept = torch.stack([d.kept for d in self._deltas.values()]).double()
        scores: Tensors = []
        if step.finished:
            moving = [torch.stack(average[1::3])[..., 0].double() for average in (self.sensitivity_, self.uncertainty_)]
            scores = [*self._parts, *moving, self._parts.sum(0)]
        columns = to_array(torch.stack([*scores, kept]))  # the one copy off the device
        yield Record("budget", schedule.budget(step.index))
        yield from (Record("rank", row.sum(), name) for name, row in zip(self._deltas, columns[-1], strict=True))
        if step.finished:
            yield Record("penalty", float(self._penalty))
            for quantity, rows in zip((*_SCORES, "importance", "kept"), columns, strict=True):
                yield from (Record(quantity, row, name) for name, row in zip(self._deltas, rows, strict=True))

    def settled(self, step: Step) -> bool:
        """From the step on that fixes the choice."""
        return step.index >= self.schedule(step.total).fixed


class AdaLoRADelta(LoRADelta):
    """The update scale * B diag(diagonal) A of one module; ``kept`` tells which components are in use."""

    kept: Tensor

    def __init__(self, host: nn.Module, rank: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(host, rank, scale, dropout)
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        # A column, so that it is decayed like the matrices.
        self.diagonal = nn.Parameter(torch.zeros(rank, 1, dtype=self.A.dtype))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))

    @property
    def right(self) -> Float[Tensor, "rank in"]:
        return self.diagonal * self.A

    @property
    def rank(self) -> int:
        """Components in use by the last choice; the others may hold a lambda again until the next one."""
        return int(self.kept.sum())

    def factors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "diagonal": self.diagonal[:, 0]}

    def update(self) -> LowRank:
        return LowRank(to_array(self.B) * to_array(self.diagonal[:, 0]), to_array(self.A), self.scale)


@dataclass(frozen=True)
class Schedule:
    """T, t_i, t_f, DeltaT, b_0 and b_T of a run, and what follows from them at a 0-based step."""

    total: int
    initial: int
    final: int
    every: int
    start: int
    target: int

    @property
    def fixed(self) -> int:
        """The step that chooses for the last time."""
        return self.total - max(self.final, 1)

    def budget(self, index: int) -> int:
        """Components that all modules may have together after a step: equation 14, rounded down."""
        if index >= self.fixed:
            return self.target
        if index <= self.initial:
            return self.start
        left = 1 - (index - self.initial) / (self.total - self.final - self.initial)
        return int((self.start - self.target) * left**3 + self.target)

    def chooses(self, index: int) -> bool:
        """Are the components to be kept chosen anew at this step?"""
        return index == self.fixed or (self.initial < index < self.fixed and index % self.every == 0)

    def masks(self, index: int) -> bool:
        """Are the others' lambdas set to zero after this step?"""
        return index > self.fixed or self.chooses(index)


def orthogonality(left: Tensors, right: Tensors, form: str) -> Float[Tensor, ""]:
    """R(P, Q) of all P (out, rank) and Q (rank, in), computed in stacks of one shape; ``form`` as in ``AdaLoRA``."""
    stacks: dict[torch.Size, list[Tensor]] = {}
    for rows in (*(P.T for P in left), *right):
        stacks.setdefault(rows.shape, []).append(rows)
    differences = []
    for alike in stacks.values():
        rows = torch.stack(alike).to(torch.promote_types(alike[0].dtype, torch.float32))
        differences.append((rows @ rows.mT - torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)).flatten(1))
    if form == "sum-square":
        return torch.cat(differences).square().sum()
    return torch.linalg.vector_norm(torch.cat(differences), dim=1).mean()


def smooth(
    sensitivity: Tensors, uncertainty: Tensors, weights: Tensors, gradients: Tensors, betas: tuple[float, float]
) -> None:
    """Take one step's |w dL/dw| into the moving averages, in place: equations 10 to 12."""
    wide = [(w.to(s.dtype), g.to(s.dtype)) for s, w, g in zip(sensitivity, weights, gradients, strict=True)]
    now = torch._foreach_mul([w for w, _ in wide], [g for _, g in wide])
    torch._foreach_abs_(now)
    torch._foreach_lerp_(sensitivity, now, 1 - betas[0])
    torch._foreach_sub_(now, sensitivity)
    torch._foreach_abs_(now)
    torch._foreach_lerp_(uncertainty, now, 1 - betas[1])


def importance(sensitivity: Tensors, uncertainty: Tensors) -> Float[Tensor, "3 modules rank"]:
    """The summands of equation 9, of P, lambda and Q, in float64; from the averages of one module after another."""
    scores = torch._foreach_mul(sensitivity, uncertainty)
    left = [P.mean(0, dtype=torch.float64) for P in scores[0::3]]
    right = [Q.mean(1, dtype=torch.float64) for Q in scores[2::3]]
    return torch.stack([torch.stack(left), torch.stack(scores[1::3])[..., 0].double(), torch.stack(right)])


def most_important(scores: Float[Tensor, "modules rank"], budget: int) -> Bool[Tensor, "modules rank"]:
    """True for exactly ``budget`` components; among equals the earlier module and index win."""
    order = scores.flatten().argsort(descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill_(0, order[:budget], True).view_as(scores)
