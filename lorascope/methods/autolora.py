r"""AutoLoRA: the rank of each matrix is learned by weighting its components on data that its factors do not train on.

.. math::

    W = W_0 + s B \operatorname{diag}(\alpha) A, \qquad \alpha = \operatorname{softmax}(\beta), \qquad
    s = \text{lora\_alpha} / k

Search. Each step uses a batch of the train split and one of the search split; w is all that the optimizer updates.
It looks ahead to w', and the gradient g of the logits has a direct and an indirect term:

.. math::

    w' &= w - \eta \nabla_w L_\text{train}(w, \beta) \\
    v &= \nabla_{w'} L_\text{search}(w', \beta) \\
    g &= \nabla_\beta L_\text{search}(w', \beta)
        - \frac{\partial^2 L_\text{train}(w, \beta)}{\partial \beta\, \partial w} \eta v \\
    \beta &\leftarrow \operatorname{Adam}(\beta, g)

Then AdamW updates w on the same train batch; w' is discarded.

Retraining. The rank of a matrix is #{j : alpha_j >= 1/k} at the last step. LoRA with these ranks trains from W_0 on
both splits, with s = lora_alpha / rank of each matrix. No rank is 0, because 1/k is the mean of alpha. The sum of the
ranks is an outcome, not a budget.

==========  ==================================================================================
paper       here
==========  ==================================================================================
U, V        the factors ``B`` (out, k), ``A`` (k, in)
k           ``rank``
lora_alpha  the field ``alpha``, which sets the scale s
beta        the buffer ``logits`` (k,), initially zero, in float32 or wider
alpha       ``AutoLoRADelta.alpha``
eta         the optimizer's learning rate at this step, per parameter
rho         ``selection_lr``
==========  ==================================================================================

Source: AutoLoRA (arXiv 2403.09113), equations 1-5, sections 4.1-4.5. The finite difference, its radius ``0.01 / |v|``
and ``first_order``: DARTS (arXiv 1806.09055), which the authors' code follows.

Departs:

- If adapter and head have different learning rates, eta v is a product per parameter, and the finite difference is
  taken along it.
- The look-ahead is the plain gradient step of equation 4, although w itself is updated by AdamW with clipping.
- w includes the classifier head, as in the authors' code.
- The scale s comes from the authors' code; the paper does not scale.
- The logits are updated by Adam, as in the authors' code, with betas (0.5, 0.999), a constant learning rate and no
  weight decay. The paper uses AdamW.
- Search and retraining are numbers of steps, each with a complete learning-rate schedule. The search has as many as the
  retraining unless ``search_steps`` is set; the paper searches "until convergence".
- Batches of the search split are drawn at random.
- The threshold applies to alpha; the authors' code for GLUE compares logits.
- ``hypergradient="betty"`` is the finite difference of the authors' code around a plain look-ahead step; the code takes
  an Adam step there.

Cost: a search step takes five forward and backward passes instead of one (``exact``: three, one of them with two
backward passes; ``first_order``: two). ``accumulate`` does not split them. The step copies w a few times, but no
frozen weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lorascope.adapters.delta import host_weight, to_array
from lorascope.array_types import Bool, Float
from lorascope.methods.field_checks import require, require_integer, require_literals, require_scaling
from lorascope.methods.lora import LoRA, LoRADelta
from lorascope.methods.method import AdapterMethod, Batch, Phase, Step, added_later
from lorascope.methods.precision import wide_dtype
from lorascope.runs.run import Run
from lorascope.schema.records import Quantity, Record, register

BETAS = (0.5, 0.999)  # of Adam for the logits, as in the authors' code
RADIUS = 0.01  # of the finite difference, divided by |v|, as in DARTS
RECORD_EVERY = 10

Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]

_DIRECT = "gradient of the search loss with respect to the logits at the step that ends here, with w' held fixed"
_INDIRECT = _DIRECT.replace("with w' held fixed", "through w', which depends on them")
register(
    "train AutoLoRA",
    "AutoLoRA, eq. 3 and 5",
    alpha=Quantity("α", "", "component", definition="softmax of the logits of one matrix"),
    logit=Quantity("logit", "", "component", definition="logits whose softmax is alpha"),
    alpha_entropy=Quantity("entropy of α", "nats", "none", definition="-sum alpha log alpha"),
    hypergradient_direct=Quantity("direct hypergradient", "", "component", definition=_DIRECT),
    hypergradient_indirect=Quantity("indirect hypergradient", "", "component", definition=_INDIRECT),
    lookahead_gradient_norm=Quantity(
        "‖v‖", "", "none", definition="norm of the gradient of the search loss with respect to w'"
    ),
)


@dataclass(kw_only=True)
class AutoLoRA(AdapterMethod, name="autolora"):
    """Ranks found by meta-learning, then LoRA with these ranks.

    Parameters
    ----------
    rank : int
        k, the number of components per matrix during the search.
    alpha : float
        Scaling: the update is multiplied by alpha / k in the search, then by alpha / rank of each matrix.
    dropout : float
        Dropout probability on the input of A, in both phases.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``ls.module_table.match``.
    selection_lr : float
        Learning rate of the logits.
    hypergradient : {"finite_difference", "exact", "first_order", "betty"}
        "exact" differentiates twice, "first_order" is at w as if eta were 0, and "betty" is the authors' code:
        differences around w' instead of w, with eta = 1. Differences lose digits in bfloat16.
    search_share : float
        Fraction of the train split on which the logits train.
    search_steps : int or None
        Optimizer steps of the search; None uses the steps of ``train``, as the retraining does.
    constraint : {"softmax", "sigmoid", "none"}
        Form of alpha. The ablations of table 4 are the sigmoid of each logit, with a threshold of 0.5, and no
        constraint: alpha is 1/k plus the logit, and its mean the threshold.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q", "v")
    selection_lr: float = 1e-3
    hypergradient: Literal["finite_difference", "exact", "first_order", "betty"] = "finite_difference"
    lr: float = 1e-4
    head_lr: float = 1e-4
    search_share: float = 0.5
    search_steps: int | None = field(default=None, metadata=added_later())
    constraint: Literal["softmax", "sigmoid", "none"] = field(default="softmax", metadata=added_later())

    def __post_init__(self) -> None:
        require_integer(self, 1, "rank", "search_steps")
        require_scaling(self)
        require(self, "selection_lr", "finite and >= 0", 0 <= self.selection_lr < math.inf)
        require_literals(self)
        require(self, "search_share", "in (0, 1)", 0 < self.search_share < 1)

    @classmethod
    def example(cls) -> AutoLoRA:
        return cls(rank=3, selection_lr=0.1, dropout=0.1, lr=1e-2)

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; the optimizer trains factors and head, ``before_step`` the logits.

        Raises
        ------
        ValueError
            The model recomputes activations in the backward pass (gradient checkpointing).
        """
        # The recomputed pass would use the model's own weights instead of those of the look-ahead, without an error if
        # the checkpoints are reentrant.
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError(
                "cannot checkpoint the search of AutoLoRA: it differentiates at other weights; disable gradient "
                "checkpointing, or set it for a LoRA with the ranks of a search"
            )
        super().attach(model)
        zeros = torch.zeros_like(torch.stack([delta.logits for delta in self._deltas.values()]))
        self.moments_: dict[str, Any] = {"steps": 0, "first": zeros, "second": zeros}

    def delta(self, name: str, host: nn.Module) -> AutoLoRADelta:
        """Return B diag(alpha) A of one module."""
        delta = AutoLoRADelta(host, self.rank, self.alpha / self.rank, self.dropout, self.constraint)
        dtype = host_weight(host).dtype
        if dtype != delta.logits.dtype and self.hypergradient in ("finite_difference", "betty"):
            problem = f"weights in {dtype} would round its differences to zero"
            fix = 'Load them in float32, or set hypergradient="exact"'
            raise ValueError(f"cannot use hypergradient {self.hypergradient!r}: {problem}. {fix}")
        return delta

    def before_step(self, step: Step) -> None:
        """Take one step of the outer problem, which changes only the logits."""
        rate_of: dict[nn.Parameter, float] = {}
        for group in step.optimizer.param_groups:
            rate_of |= dict.fromkeys(group["params"], group["lr"])
        weights = {name: parameter for name, parameter in step.model.named_parameters() if parameter in rate_of}
        rates = {name: rate_of[parameter] for name, parameter in weights.items()}
        logits = {module: delta.logits for module, delta in self._deltas.items()}

        def loss_of(batch: Batch) -> Loss:
            rows, weight = step.local_rows(batch)

            def loss(w: Tensors, beta: Tensors) -> Tensor:
                buffers = {f"{module}.delta.logits": value for module, value in beta.items()}
                return step.loss(rows, {**w, **buffers}) * weight

            return loss

        train, search = loss_of(step.batch), loss_of(step.validation())
        self._terms = terms = hypergradient(
            train, search, weights, logits, rates, self.hypergradient, step.sum_processes
        )
        gradient = torch.stack([terms.direct[module] + terms.indirect[module] for module in logits])
        moves, self.moments_ = adam(gradient, self.moments_, self.selection_lr)
        for delta, move in zip(self._deltas.values(), moves, strict=True):
            delta.logits.sub_(move)

    @torch.no_grad()
    def records(self, step: Step) -> Iterable[Record]:
        """Yield the selection weights and the hypergradient every ten steps and at the end."""
        if step.finished % RECORD_EVERY and not step.last:
            return
        for module, delta in self._deltas.items():
            alpha = delta.alpha
            vectors = {"alpha": alpha, "logit": delta.logits}
            if self.constraint == "softmax":
                vectors["alpha_entropy"] = torch.special.entr(alpha).sum()
            if step.finished:
                vectors["hypergradient_direct"] = self._terms.direct[module]
                vectors["hypergradient_indirect"] = self._terms.indirect[module]
            if step.last:
                vectors["importance"] = alpha
            yield Record("rank", delta.rank, module)
            for quantity, vector in vectors.items():
                yield Record(quantity, to_array(vector), module)
        if step.finished and self._terms.norm is not None:
            yield Record("lookahead_gradient_norm", self._terms.norm)

    def phases(self, base: Mapping[str, Tensor]) -> Generator[Phase, Run, None]:
        """Yield the search, then LoRA with the ranks found, from W_0 on all of the train split."""
        # Section 4.5: the factors of the search are discarded, only the ranks remain.
        search = yield Phase(self, "search", steps=self.search_steps)
        common = {name: getattr(self, name) for name in ("alpha", "dropout", "lr", "head_lr", "search_share")}
        yield Phase(LoRA(rank=search.ranks(), **common), "retrain", split="train+search")


class AutoLoRADelta(LoRADelta):
    """AutoLoRA's update scale * B diag(alpha) A of one module; alpha is the softmax of the buffer ``logits``.

    ``constraint`` is ``AutoLoRA.constraint``.
    """

    logits: Tensor

    def __init__(
        self, host: nn.Module, rank: int, scale: float = 1.0, dropout: float = 0.0, constraint: str = "softmax"
    ) -> None:
        super().__init__(host, rank, scale, dropout)
        self.constraint = constraint
        # A buffer, because the optimizer must not train the logits.
        self.register_buffer("logits", torch.zeros(rank, dtype=wide_dtype(self.A)))

    @property
    def alpha(self) -> Float[Tensor, "k"]:
        """Selection weights of the components; under the softmax they sum to 1."""
        if self.constraint == "softmax":
            return self.logits.softmax(0)
        if self.constraint == "sigmoid":
            return self.logits.sigmoid()
        # The logits start at zero, and an update with zero weights would not train.
        return self.logits + 1 / len(self.logits)

    @property
    def right(self) -> Float[Tensor, "k in"]:
        return self.alpha[:, None].to(self.A.dtype) * self.A

    @property
    def rank(self) -> int:
        """Number of components that are retained if the search ends here."""
        if self.constraint == "softmax":
            return int(retained_mask(self.alpha).sum())
        return int((self.alpha >= (0.5 if self.constraint == "sigmoid" else self.alpha.mean())).sum())

    def factors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "diagonal": self.alpha}


def retained_mask(alpha: Float[Tensor, "k"]) -> Bool[Tensor, "k"]:
    """Return a mask of the components that AutoLoRA retains: those with at least the mean weight."""
    return alpha >= 1 / len(alpha)  # 1/k is the mean of alpha, so at least one component reaches it


class Hypergradient(NamedTuple):
    """The two terms of AutoLoRA's equation 5 by name of the logits, and the norm of v, None without a look-ahead."""

    direct: Tensors
    indirect: Tensors
    norm: float | None


def hypergradient(
    train: Loss,
    search: Loss,
    weights: Tensors,
    logits: Tensors,
    rates: Mapping[str, float],
    form: str,
    total: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> Hypergradient:
    """Compute the gradient of AutoLoRA's search loss after the look-ahead for the logits, changing no argument.

    ``rates`` is eta of each weight, and ``form`` ``AutoLoRA.hypergradient``. With several processes, the losses are of
    the rows of this one, and ``total`` sums gradients over all. Raise a ValueError if the attention of the model does
    not support the second derivatives of "exact".
    """
    w, beta = _leaves(weights), _leaves(logits)
    if form == "first_order":
        return Hypergradient(total(_gradient(search(w, beta), beta)), _map(torch.zeros_like, beta), None)
    # Equation 4, the look-ahead: only "exact" differentiates its gradient again.
    slope = _gradient(train(w, beta), w, create_graph=form == "exact")
    # The sum over processes comes first: the search loss is nonlinear in the look-ahead, so the mean of the processes'
    # hypergradients would be another one.
    total_slope = total(slope)
    ahead = _leaves({name: w[name] - rates[name] * total_slope[name] for name in w})
    # One backward pass gives both v and the direct term.
    gradient = dict(total(_gradient(search(ahead, beta), {**ahead, **beta})))
    direct = {name: gradient.pop(name) for name in beta}
    v = gradient
    eta_v = {name: rates[name] * v[name] for name in w}
    if form == "exact":
        # The derivative of <slope, eta v> by beta is the mixed derivative times eta v.
        products = [(slope[name] * eta_v[name]).sum() for name in slope]
        try:
            mixed = _gradient(torch.stack(products).sum(), beta)
        except RuntimeError as error:
            # Fused attention kernels have no second derivative, which torch reports in this way.
            if "is not implemented" not in str(error):
                raise
            problem = "this attention has no second derivatives"
            fix = 'Set attention="eager" in train, or hypergradient="finite_difference"'
            raise ValueError(f"cannot use hypergradient 'exact': {problem}. {fix}") from error
    elif form == "betty":  # the library of the authors' code
        mixed = _mixed_difference(train, ahead, v, beta)
    else:
        mixed = _mixed_difference(train, w, eta_v, beta)
    # Equation 5 subtracts the mixed term.
    return Hypergradient(direct, _map(torch.neg, total(mixed)), _norm(v))


def _map(function: Callable[[Tensor], Tensor], tensors: Tensors) -> dict[str, Tensor]:
    return {name: function(tensor) for name, tensor in tensors.items()}


def _leaves(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors as leaves that share their memory and start a new graph."""
    return _map(lambda tensor: tensor.detach().requires_grad_(), tensors)


def _mixed_difference(loss: Loss, center: Tensors, direction: Tensors, logits: Tensors) -> dict[str, Tensor]:
    """Compute [d2 L / dlogits dw] direction by a central difference of dL/dlogits, ``RADIUS`` away from the center."""
    norm = _norm(direction)
    if norm == 0:
        return _map(torch.zeros_like, logits)
    epsilon = RADIUS / norm

    def shifted_gradient(shift: float) -> Tensors:
        weights = {name: center[name].detach() + shift * direction[name] for name in center}
        return _gradient(loss(weights, logits), logits)

    up, down = shifted_gradient(epsilon), shifted_gradient(-epsilon)
    return {name: (up[name] - down[name]) / (2 * epsilon) for name in logits}


def _gradient(loss: Float[Tensor, ""], tensors: Tensors, create_graph: bool = False) -> dict[str, Tensor]:
    """Compute gradients by name; they are zero for tensors that the loss does not depend on."""
    leaves = list(tensors.values())
    gradients = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, gradients, strict=True))


def _norm(tensors: Tensors) -> float:
    """Compute the norm over all entries of all tensors."""
    return float(torch.nn.utils.get_total_norm(list(tensors.values())))


def adam(
    gradient: Float[Tensor, "modules k"], moments: Mapping[str, Any], rate: float
) -> tuple[Float[Tensor, "modules k"], dict[str, Any]]:
    """Return the step that Adam subtracts from AutoLoRA's logits, and its new moments."""
    (beta1, beta2), steps = BETAS, moments["steps"] + 1
    # torch.lerp(g, m, beta) is beta m + (1 - beta) g.
    first = torch.lerp(gradient, moments["first"], beta1)
    second = torch.lerp(gradient.square(), moments["second"], beta2)
    move = rate * (first / (1 - beta1**steps)) / ((second / (1 - beta2**steps)).sqrt() + 1e-8)
    return move, {"steps": steps, "first": first, "second": second}
