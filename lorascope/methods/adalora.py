r"""AdaLoRA: adapters in the form of a singular value decomposition; the least important components are masked.

.. math::

    W &= W_0 + c\, P \operatorname{diag}(\lambda)\, Q, \qquad c = \alpha / r_0, \qquad L = C + \gamma R(P, Q) \\
    b(t) &= b_T + (b_0 - b_T) \left(1 - \frac{t - t_i}{T - t_i - t_f}\right)^3 \\
    I &= |w\, \partial L / \partial w|, \qquad \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I, \qquad
        \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |I - \bar I| \\
    s &= \bar I \bar U, \qquad S_i = s(\lambda_i) + \operatorname{mean}_j s(P_{ji}) + \operatorname{mean}_j s(Q_{ij})

Every DeltaT steps after t_i the components of all matrices are ordered by S, and only the b(t) highest retain their
lambda. Masking leaves P and Q unchanged and lambda continues to train, so a masked component can return until the last
t_f steps. The ablations of table 4 are ``importance="sensitivity"``, s = I, and ``"magnitude"``, S = abs(lambda).

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

Departs:

- R is the mean of ``|P^T P - I|_F`` and ``|Q Q^T - I|_F`` over all factors, as in the authors' code;
  ``penalty="sum-square"`` is the paper's sum of squares.
- I uses the weights after the optimizer's step and the gradient before it, as in the code; ``scores="before"`` is the
  paper's order.
- The numerator of equation 14 is t - t_i, as in the code; the printed t - t_i - t_f would start above b_0.
- c is alpha / (r_0 + 1e-5), as in the code, however many components are masked.
- P and Q are normal with standard deviation 0.02, as in the code.
- Exactly b components are retained, by score, then order of modules, then index; the code masks all components that
  are tied with the threshold.
- The budget is b_T from step T - t_f on, even if DeltaT skips that step. At the last step it is b_T even if t_f is 0.
- alpha must be positive; the code replaces other values by r_0.
- Embeddings may be adapted too.
- The default learning rate is ten times the paper's 1e-3, with which lambda hardly leaves zero in a hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lorascope.adapters.delta import to_array
from lorascope.array_types import Bool, Float
from lorascope.methods.field_checks import default_if_none, require, require_integer, require_literals, require_scaling
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import AdapterMethod, Step, added_later
from lorascope.methods.precision import wide_dtype
from lorascope.schema.records import Item, Quantity, Record, register

# Quantities of each component in the order in which they are computed: label, definition, equation.
_SCORES = {
    "importance_left": ("importance of P", "mean of s over the column of P", 9),
    "importance_lambda": ("importance of λ", "s(lambda)", 9),
    "importance_right": ("importance of Q", "mean of s over the row of Q", 9),
    "sensitivity": ("sensitivity of λ", "moving average of |w dL/dw|", 11),
    "uncertainty": ("uncertainty of λ", "moving average of the distance of |w dL/dw| from its moving average", 12),
}
for _name, (_label, _meaning, _equation) in _SCORES.items():
    _quantity = Quantity(_label, index="rank_id", definition=_meaning, source=f"AdaLoRA, eq. {_equation}")
    register("train AdaLoRA", **{_name: _quantity})
register(
    "train AdaLoRA",
    kept=Quantity("retained", index="rank_id", pool="sum", definition="1 for a component in use, else 0"),
    penalty=Quantity("penalty", definition="R(P, Q), not multiplied by gamma", source="AdaLoRA, eq. 4"),
    penalty_left=Quantity("‖PᵀP − I‖²", pool="sum", definition="|P^T P - I|_F^2", source="AdaLoRA, eq. 4"),
    penalty_right=Quantity("‖QQᵀ − I‖²", pool="sum", definition="|Q Q^T - I|_F^2", source="AdaLoRA, eq. 4"),
)

Tensors = list[Tensor]


class Triple(NamedTuple):
    """Weights of an AdaLoRA module, or values of the same shapes: P (out, rank), lambda (rank, 1), Q (rank, in)."""

    P: Tensor
    scales: Tensor
    Q: Tensor

    @classmethod
    def by_module(cls, tensors: Sequence[Tensor]) -> list[Triple]:
        """Return the triples of a flat list, the form that batched operations take."""
        return [cls(*tensors[start : start + 3]) for start in range(0, len(tensors), 3)]


@dataclass(kw_only=True)
class AdaLoRA(AdapterMethod, name="adalora"):
    """Low-rank adaptation that allocates a rank budget by importance during training.

    Parameters
    ----------
    init_rank : int
        Initial number of components per module.
    target_rank : float
        Final number of components per module, averaged over the modules.
    alpha : float
        Scaling: the update is multiplied by alpha / init_rank throughout.
    dropout : float
        Dropout probability on the input of A.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``ls.module_table.match``. "all-linear" includes
        gate projections and cross-attention.
    initial_steps : int, optional
        Steps before the budget falls; by default a tenth of the run.
    final_steps : int, optional
        Last steps, in which the selection is fixed; by default three tenths of the run.
    mask_every : int, optional
        Steps between two selections; by default a hundredth of the run.
    beta1, beta2 : float
        Decay of the moving averages of sensitivity and uncertainty.
    gamma : float
        Weight of the orthogonality penalty.
    penalty : {"mean-norm", "sum-square"}
        Form of the penalty: that of the authors' code, or of the paper.
    scores : {"after", "before"}
        Whether sensitivity uses the weights after the optimizer's step, or before it.
    importance : {"smoothed", "sensitivity", "magnitude"}
        Score s of a weight: smoothed sensitivity times uncertainty, or the sensitivity of the last step only, which is
        then recorded as ``sensitivity``. "magnitude" orders components by the absolute value of lambda instead.
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
    importance: Literal["smoothed", "sensitivity", "magnitude"] = field(default="smoothed", metadata=added_later())
    lr: float = 1e-2
    head_lr: float = 1e-3

    def __post_init__(self) -> None:
        require_integer(self, 1, "init_rank", "mask_every")
        require_integer(self, 0, "initial_steps", "final_steps")
        allowed = f"in [0, init_rank = {self.init_rank}]"
        require(self, "target_rank", allowed, 0 <= self.target_rank <= self.init_rank)
        require_scaling(self)
        require(self, "beta1", "in (0, 1)", 0 < self.beta1 < 1)
        require(self, "beta2", "in (0, 1)", 0 < self.beta2 < 1)
        require(self, "gamma", "finite", math.isfinite(self.gamma))
        require_literals(self)

    @classmethod
    def example(cls) -> AdaLoRA:
        return cls(init_rank=3, target_rank=1, initial_steps=0, final_steps=2, mask_every=1, dropout=0.1, lr=1e-2)

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets, leave adapters and head trainable, and start the moving averages at zero."""
        super().attach(model)
        self._triples = [Triple(delta.B, delta.diagonal, delta.A) for delta in self._deltas.values()]
        self._weights: Tensors = [*chain.from_iterable(self._triples)]
        self._scored_weights = self._weights
        # Products of small gradients would underflow in half precision.
        self.sensitivity_ = [weight.new_zeros(weight.shape, dtype=wide_dtype(weight)) for weight in self._weights]
        self.uncertainty_ = [average.clone() for average in self.sensitivity_]

    def delta(self, name: str, host: nn.Module) -> AdaLoRADelta:
        """Return P diag(lambda) Q of one module."""
        # The authors' code adds 1e-5 to the rank; c does not change when components are masked.
        return AdaLoRADelta(host, self.init_rank, self.alpha / (self.init_rank + 1e-5), self.dropout)

    def schedule(self, total: int) -> Schedule:
        """Return the budget schedule of a run of ``total`` steps, which must suffice for its three phases."""
        initial = default_if_none(self.initial_steps, round(0.1 * total))
        final = default_if_none(self.final_steps, round(0.3 * total))
        every = default_if_none(self.mask_every, max(1, total // 100))
        if initial + final >= total:
            sizes = f"{total}, the steps of the run, got {initial} + {final}"
            raise ValueError(f"initial_steps + final_steps must be < {sizes}")
        modules = len(self._deltas)
        return Schedule(total, initial, final, every, modules * self.init_rank, round(modules * self.target_rank))

    def after_backward(self, step: Step) -> None:
        """Add the gradient of the penalty."""
        P, _, Q = zip(*self._triples, strict=True)
        penalty = orthogonality(P, Q, self.penalty)
        # A separate backward pass keeps the penalty out of the recorded loss.
        (self.gamma * penalty).backward()
        self._penalty = penalty.detach()
        if self.scores == "before":
            # The optimizer changes the weights in place.
            self._scored_weights = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Update the scores until the selection is fixed, select components if due, and mask the others."""
        schedule, smoothed = self.schedule(step.total), self.importance != "sensitivity"
        if step.index < schedule.fixed:
            # A module that the batch did not use has no gradient, which counts as zero.
            gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
            # Without smoothing, the average is the sensitivity of this step.
            betas = (self.beta1 if smoothed else 0.0, self.beta2)
            smooth(self.sensitivity_, self.uncertainty_, self._scored_weights, gradients, betas)
        # At the last step they are only recorded.
        if schedule.chooses(step.index) or step.last:
            self._terms = importance_terms(self.sensitivity_, self.uncertainty_ if smoothed else None)
            if self.importance == "magnitude":
                size = _scales(self._weights).abs()
                self._terms = torch.stack([torch.zeros_like(size), size, torch.zeros_like(size)])
        masks = [delta.kept for delta in self._deltas.values()]
        if schedule.chooses(step.index):
            retained = most_important(self._terms.sum(0), schedule.budget(step.index))
            torch._foreach_copy_(masks, list(retained))
        if schedule.masks(step.index):
            scales = [triple.scales for triple in self._triples]
            masked = torch.stack(scales).masked_fill_(~torch.stack(masks)[..., None], 0)
            torch._foreach_copy_(scales, list(masked))

    @torch.no_grad()
    def records(self, step: Step) -> Iterable[Item]:
        """Yield ranks and budget at the start, at every selection and at the end, with their scores after the start.

        The penalty is recorded at every step, at the weights of the step's gradient; its term of each factor at the
        start, a hundred times in the run and at every selection, at the weights after the step.
        """
        schedule = self.schedule(step.total)
        selects = schedule.chooses(step.index) or step.last
        if step.finished:
            yield Record("penalty", float(self._penalty))
        if not step.finished or selects or step.index % max(1, step.total // 100) == 0:
            yield from self._factor_penalties()
        if step.finished and not selects:
            return
        columns: dict[str, Tensor] = {}
        if step.finished:
            averages = (_scales(self.sensitivity_), _scales(self.uncertainty_))
            columns = dict(zip(_SCORES, (*self._terms, *averages), strict=True))
            columns["importance"] = self._terms.sum(0)
        if self.importance == "sensitivity":
            columns.pop("uncertainty", None)  # without smoothing, a distance from itself
        columns["kept"] = torch.stack([delta.kept for delta in self._deltas.values()]).double()
        values = to_array(torch.stack([*columns.values()]))  # a single copy from the device
        yield Record("budget", schedule.budget(step.index))
        for name, row in zip(self._deltas, values[-1], strict=True):
            yield Record("rank", row.sum(), name)
        if step.finished:
            for quantity, rows in zip(columns, values, strict=True):
                for name, row in zip(self._deltas, rows, strict=True):
                    yield Record(quantity, row, name)

    def _factor_penalties(self) -> Iterable[Record]:
        left = squared_distances([triple.P.T for triple in self._triples])
        right = squared_distances([triple.Q for triple in self._triples])
        values = to_array(torch.stack([left, right]))  # a single copy from the device
        for name, P, Q in zip(self._deltas, *values, strict=True):
            yield Record("penalty_left", P, name)
            yield Record("penalty_right", Q, name)

    def settled(self, step: Step) -> bool:
        """Return whether the selection is fixed."""
        return step.index >= self.schedule(step.total).fixed

    def describe(self) -> dict[str, Any]:
        """Return the common facts, and that components are masked and not deleted."""
        return super().describe() | {"masks_components": True}


class AdaLoRADelta(LoRADelta):
    """AdaLoRA's update scale * B diag(diagonal) A of one module; ``kept`` marks the components in use."""

    kept: Tensor

    def __init__(self, host: nn.Module, rank: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(host, rank, scale, dropout)
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        # A matrix of one column, because vectors have no weight decay and P and Q do.
        self.diagonal = nn.Parameter(torch.zeros(rank, 1, dtype=self.A.dtype))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))

    @property
    def right(self) -> Float[Tensor, "rank in"]:
        return self.diagonal * self.A

    @property
    def rank(self) -> int:
        """Components in use since the last selection; until the next one, lambda of the others may become nonzero."""
        return int(self.kept.sum())

    def factors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "diagonal": self.diagonal[:, 0]}


@dataclass(frozen=True)
class Schedule:
    """Budget schedule of an AdaLoRA run by 0-based step. The fields are T, t_i, t_f, DeltaT, b_0 and b_T."""

    total: int
    initial: int
    final: int
    every: int
    start: int
    target: int

    @property
    def fixed(self) -> int:
        """Step of the last selection."""
        # Even if t_f is 0, components are selected at the last step: the result has the budget b_T.
        return self.total - max(self.final, 1)

    def budget(self, index: int) -> int:
        """Return the total number of components allowed after a step: equation 14, rounded down."""
        if index >= self.fixed:
            return self.target
        if index <= self.initial:
            return self.start
        # The numerator of the code: t - t_i - t_f, as printed, would start above b_0.
        remaining = 1 - (index - self.initial) / (self.total - self.final - self.initial)
        return int((self.start - self.target) * remaining**3 + self.target)

    def chooses(self, index: int) -> bool:
        """Return whether components are selected at this step."""
        return index == self.fixed or (self.initial < index < self.fixed and index % self.every == 0)

    def masks(self, index: int) -> bool:
        """Return whether lambda of the other components is set to zero after this step."""
        return index > self.fixed or self.chooses(index)


def orthogonality(left: Sequence[Tensor], right: Sequence[Tensor], form: str) -> Float[Tensor, ""]:
    """Compute AdaLoRA's penalty R(P, Q) of all P (out, rank) and Q (rank, in); ``form`` is ``AdaLoRA.penalty``."""
    # One batched product for all matrices of a shape.
    by_shape: dict[torch.Size, Tensors] = {}
    for matrix in (*[P.T for P in left], *right):
        by_shape.setdefault(matrix.shape, []).append(matrix)
    differences = []
    for matrices in by_shape.values():
        rows = torch.stack(matrices).to(wide_dtype(matrices[0]))
        differences.append((rows @ rows.mT - torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)).flatten(1))
    if form == "sum-square":
        return torch.cat(differences).square().sum()
    return torch.linalg.vector_norm(torch.cat(differences), dim=1).mean()


def squared_distances(matrices: Sequence[Tensor]) -> Float[Tensor, "matrices"]:
    """Compute ``|M M^T - I|_F^2`` in float64 of each M (rank, columns): the terms of AdaLoRA's penalty."""
    squares = []
    for matrix in matrices:
        product = matrix.double() @ matrix.double().T
        product.diagonal().sub_(1)
        squares.append(product.square().sum())
    return torch.stack(squares)


def smooth(
    sensitivity: Tensors, uncertainty: Tensors, weights: Tensors, gradients: Tensors, betas: tuple[float, float]
) -> None:
    """Update AdaLoRA's moving averages in place with ``|w dL/dw|`` of one step: equations 10 to 12."""
    wide_weights = [weight.to(average.dtype) for weight, average in zip(weights, sensitivity, strict=True)]
    wide_gradients = [gradient.to(average.dtype) for gradient, average in zip(gradients, sensitivity, strict=True)]
    change = torch._foreach_mul(wide_weights, wide_gradients)
    torch._foreach_abs_(change)  # I, equation 10
    torch._foreach_lerp_(sensitivity, change, 1 - betas[0])  # equation 11
    # Equation 12 takes the distance from the average that equation 11 has just updated, as in the code.
    torch._foreach_sub_(change, sensitivity)
    torch._foreach_abs_(change)
    torch._foreach_lerp_(uncertainty, change, 1 - betas[1])


def importance_terms(sensitivity: Tensors, uncertainty: Tensors | None) -> Float[Tensor, "3 modules rank"]:
    """Compute the terms of AdaLoRA's equation 9 in float64, from averages ordered P, lambda, Q per module."""
    # Equation 13, or s = I.
    scores = sensitivity if uncertainty is None else torch._foreach_mul(sensitivity, uncertainty)
    triples = Triple.by_module(scores)
    left = [triple.P.mean(0, dtype=torch.float64) for triple in triples]
    right = [triple.Q.mean(1, dtype=torch.float64) for triple in triples]
    return torch.stack([torch.stack(left), _scales(scores), torch.stack(right)])


def most_important(scores: Float[Tensor, "modules rank"], budget: int) -> Bool[Tensor, "modules rank"]:
    """Return AdaLoRA's mask of the ``budget`` highest scores; ties go to the earlier module, then index."""
    # The sort is stable for the ties, which a threshold as in the code would mask together.
    order = scores.flatten().argsort(descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill_(0, order[:budget], True).view_as(scores)


def _scales(tensors: Sequence[Tensor]) -> Float[Tensor, "modules rank"]:
    """Return the values of lambda in float64, from a list ordered P, lambda, Q per module."""
    return torch.stack([triple.scales for triple in Triple.by_module(tensors)])[..., 0].double()
