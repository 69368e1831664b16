"""AutoLoRA: how many components a matrix needs is learned, by weighing them on data that its factors do not train on.

    W = W_0 + s B diag(alpha) A,    alpha = softmax(logits),    s = lora_alpha / k

Search. Each step takes a batch of the train split and one of the search split; w is all that the optimizer trains:

    w' = w - eta grad_w L_train(w, logits)                                                   the look-ahead
    v  = grad_w' L_search(w', logits)
    g  = grad_logits L_search(w', logits) - [d2 L_train(w, logits) / dlogits dw] eta v       direct + indirect
    logits <- Adam(logits, g), and then w <- AdamW(w) on the same train batch: w' is given up

Then rank = #{j : alpha_j >= 1/k} of the last step, and LoRA of these ranks trains from W_0 on both splits, with s =
lora_alpha / rank of each matrix. 1/k is the mean of alpha, so no rank is 0; their sum is an outcome, not a budget.

==========  ==================================================================================
paper       here
==========  ==================================================================================
U, V        the factors ``B`` (out, k), ``A`` (k, in)
k           ``rank``
lora_alpha  the field ``alpha``, from which the scale s follows
beta        the buffer ``logits`` (k,), zero at first, in float32 or wider
alpha       ``AutoLoRADelta.alpha``
eta         the optimizer's rate at this step, of each parameter
rho         ``selection_lr``
==========  ==================================================================================

Source: AutoLoRA (arXiv 2403.09113), equations 1-5, sections 4.1-4.5. The finite difference, its radius 0.01 / |v| and
``first_order``: DARTS (arXiv 1806.09055), which the authors' code follows.

Departs: where the rates of adapter and head differ, eta v is a product parameter by parameter, and the difference goes
along it. The look-ahead is the plain step of equation 4 though w itself moves by a clipped AdamW. From the authors'
code come the head's part in w, s, and the logits' Adam, with betas (0.5, 0.999), a constant rate and no weight decay:
the paper has AdamW and no s. It searches "until convergence", here as many steps as the retraining, those of ``train``.
Batches of the search split are drawn at random. The threshold is on alpha; the code for GLUE compares logits. Also:

- ``hypergradient`` "betty" is the finite difference of the authors' code around a plain look-ahead step; the code takes
  an Adam step there.

Cost: a search step is five passes forward and backward in place of one (``exact``: three, one of them backward twice;
``first_order``: two), uncut by ``accumulate``; it copies w a few times, and nothing that is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lorascope.adapters.delta import attach, to_array
from lorascope.methods.base import Batch, Method, Phase, Step, train_adapters
from lorascope.methods.lora import LoRA, LoRADelta
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.deprecation import accept_old_fields, formerly
from lorascope.schema.records import Quantity, Record, register
from lorascope.updates.low_rank import LowRank

BETAS = (0.5, 0.999)
RADIUS = 0.01
LOOK_EVERY = 10
HYPERGRADIENTS = ("finite_difference", "exact", "first_order", "betty")

Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]

_GRADIENT = "gradient of the search loss in the logits at the step that ends here, "
for _name, _label, _unit, _index, _definition in (
    ("alpha", "α", "", "component", "softmax of the logits of one matrix"),
    ("logit", "logit", "", "component", "what alpha is the softmax of"),
    ("alpha_entropy", "entropy of α", "nats", "none", "-sum alpha log alpha"),
    ("hypergradient_direct", "direct hypergradient", "", "component", _GRADIENT + "w' held fixed"),
    ("hypergradient_indirect", "indirect hypergradient", "", "component", _GRADIENT + "through what w' owes to them"),
    ("lookahead_gradient_norm", "‖v‖", "", "none", "norm of the gradient of the search loss in w'"),
):
    register(_name, Quantity(_label, _unit, _index, definition=_definition, source="AutoLoRA, eq. 3 and 5"))


@accept_old_fields
@dataclass(kw_only=True)
class AutoLoRA(Method, name="autolora"):
    """Ranks found by meta learning, then LoRA of these ranks.

    Parameters
    ----------
    rank : int
        k, the components of each matrix during the search.
    alpha : float
        The update is scaled by alpha / k in the search, by alpha / rank of each matrix afterwards.
    dropout : float
        Share of the input dropped on the way into A, in both phases.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``names.match``.
    selection_lr : float
        Rate of the logits.
    hypergradient : str
        "finite_difference"; "exact", by differentiating twice; "first_order", at w as if eta were 0; or "betty", as the
        authors' code has it: differences around w' in place of w, and eta taken as 1. Differences lose digits in bf16.
    search_share : float
        Share of the train split on which the logits train.
    """

    rank: int = 8
    alpha: float = field(default=16.0, metadata=formerly("lora_alpha"))
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q", "v")
    selection_lr: float = 1e-3
    hypergradient: str = "finite_difference"
    lr: float = 1e-4
    head_lr: float = 1e-4
    search_share: float = 0.5

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} is no rank: it counts components, 1 or more")
        if not 0 <= self.selection_lr < math.inf:
            raise ValueError(f"selection_lr {self.selection_lr} is no rate: it must be a number from 0 on")
        if self.hypergradient not in HYPERGRADIENTS:
            raise ValueError(f"hypergradient {self.hypergradient!r} is unknown: {', '.join(HYPERGRADIENTS)}")
        if not 0 < self.search_share < 1:
            raise ValueError(f"search_share {self.search_share} leaves train or search empty: give one between 0 and 1")

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; leave factors and head to the optimizer, the logits to ``before_step``."""
        hosts = {
            name: model.get_submodule(name) for name in module_table.match(module_table.describe(model), self.targets)
        }
        scale = self.alpha / self.rank
        self._deltas = {name: AutoLoRADelta(host, self.rank, scale, self.dropout) for name, host in hosts.items()}
        narrow = {str(delta.A.dtype) for delta in self._deltas.values() if delta.A.dtype != delta.logits.dtype}
        if narrow and self.hypergradient in ("finite_difference", "betty"):
            wanted = 'load them in float32, or take hypergradient "exact"'
            raise ValueError(f"weights in {narrow.pop()} would round a finite difference away: {wanted}")
        attach(model, self._deltas)
        train_adapters(model)
        zeros = torch.zeros_like(torch.stack([delta.logits for delta in self._deltas.values()]))
        self.moments_: dict[str, Any] = {"steps": 0, "first": zeros, "second": zeros}

    def before_step(self, step: Step) -> None:
        """The outer problem: it moves the logits and nothing else."""
        rate_of = {parameter: group["lr"] for group in step.optimizer.param_groups for parameter in group["params"]}
        weights = {name: p for name, p in step.model.named_parameters() if p in rate_of}
        rates = {name: rate_of[p] for name, p in weights.items()}
        logits = {module: delta.logits for module, delta in self._deltas.items()}

        def loss_of(batch: Batch) -> Loss:
            return lambda w, b: step.loss(batch, {**w, **{f"{module}.delta.logits": b[module] for module in b}})

        train, search = loss_of(step.batch), loss_of(step.validation())
        self._found = found = hypergradient(train, search, weights, logits, rates, self.hypergradient)
        gradient = torch.stack([found.direct[module] + found.indirect[module] for module in logits])
        moves, self.moments_ = adam(gradient, self.moments_, self.selection_lr)
        for delta, move in zip(self._deltas.values(), moves, strict=True):
            delta.logits.sub_(move)

    @torch.no_grad()
    def records(self, step: Step) -> Iterable[Record]:
        """The selection every ten steps and at the end, and the hypergradient of the step."""
        if step.finished % LOOK_EVERY and not step.last:
            return
        for module, delta in self._deltas.items():
            alpha = delta.alpha
            yield Record("alpha", to_array(alpha), module)
            yield Record("logit", to_array(delta.logits), module)
            yield Record("alpha_entropy", float(torch.special.entr(alpha).sum()), module)
            yield Record("rank", delta.rank, module)
            if step.finished:
                yield Record("hypergradient_direct", to_array(self._found.direct[module]), module)
                yield Record("hypergradient_indirect", to_array(self._found.indirect[module]), module)
            if step.last:
                yield Record("importance", to_array(alpha), module)
        if step.finished and self._found.norm is not None:
            yield Record("lookahead_gradient_norm", self._found.norm)

    def phases(self, base: Mapping[str, Tensor]) -> Generator[Phase, Run, None]:
        """Search, then LoRA of the ranks found, from W_0 and on all of the train split."""
        found = yield Phase(self, "search")
        retrained = LoRA(rank=found.ranks(), alpha=self.alpha, dropout=self.dropout)
        retrained = replace(retrained, lr=self.lr, head_lr=self.head_lr, search_share=self.search_share)
        yield Phase(retrained, "retrain", split="train+search")


class AutoLoRADelta(LoRADelta):
    """The update scale * B diag(alpha) A of one module, alpha the softmax of the buffer ``logits``."""

    logits: Tensor

    def __init__(self, host: nn.Module, rank: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(host, rank, scale, dropout)
        self.register_buffer("logits", torch.zeros(rank, dtype=torch.promote_types(self.A.dtype, torch.float32)))

    @property
    def alpha(self) -> Float[Tensor, "k"]:
        """Weights of the components; they sum to one."""
        return self.logits.softmax(0)

    @property
    def right(self) -> Float[Tensor, "k in"]:
        """The factor that meets the input."""
        return self.alpha[:, None].to(self.A.dtype) * self.A

    @property
    def rank(self) -> int:
        """Components that would stay if the search ended here."""
        return int(retained_mask(self.alpha).sum())

    def factors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "diagonal": self.alpha}

    def update(self) -> LowRank:
        return LowRank(to_array(self.B) * to_array(self.alpha), to_array(self.A), self.scale)


def retained_mask(alpha: Float[Tensor, "k"]) -> Bool[Tensor, "k"]:
    """Which components stay: those of at least the mean weight."""
    return alpha >= 1 / len(alpha)


class Hypergradient(NamedTuple):
    """Equation 5 in its two summands, by name of the logits, and |v| where there was a look-ahead."""

    direct: Tensors
    indirect: Tensors
    norm: float | None


def hypergradient(
    train: Loss, search: Loss, weights: Tensors, logits: Tensors, rates: Mapping[str, float], form: str
) -> Hypergradient:
    """The gradient in the logits of the search loss after the look-ahead; nothing that is given is changed.

    Parameters
    ----------
    train, search : callable (weights, logits) -> Tensor ()
        The two losses.
    weights, logits : mapping name -> Tensor
    rates : mapping name of a weight -> float
        eta.
    form : str
        One of ``HYPERGRADIENTS``, as in ``AutoLoRA``.

    Raises
    ------
    ValueError
        "exact" asks for second derivatives that the model does not have.
    """
    w, b = _leaves(weights), _leaves(logits)
    if form == "first_order":
        return Hypergradient(_gradient(search(w, b), b), {name: torch.zeros_like(b[name]) for name in b}, None)
    slope = _gradient(train(w, b), w, create_graph=form == "exact")
    ahead = _leaves({name: w[name] - rates[name] * slope[name] for name in w})
    both = _gradient(search(ahead, b), {**ahead, **b})
    v = {name: both[name] for name in w}
    scaled = {name: rates[name] * v[name] for name in w}
    if form == "exact":
        mixed = _mixed_exact(slope, scaled, b)
    else:
        mixed = _mixed_difference(train, *((ahead, v) if form == "betty" else (w, scaled)), b)
    return Hypergradient({name: both[name] for name in b}, {name: -mixed[name] for name in b}, _norm(v))


def _mixed_exact(slope: Tensors, direction: Tensors, logits: Tensors) -> Tensors:
    """[d2 L / dlogits dw] direction, through the graph of the slope dL/dw."""
    try:
        return _gradient(torch.stack([(slope[name] * direction[name]).sum() for name in slope]).sum(), logits)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        wanted = 'load the model with attn_implementation="eager", or take "finite_difference"'
        raise ValueError(f'hypergradient "exact" cannot differentiate this attention twice: {wanted}') from error


def _mixed_difference(loss: Loss, centre: Tensors, direction: Tensors, logits: Tensors) -> Tensors:
    """The same from dL/dlogits at two points, ``RADIUS`` to either side of the centre."""
    norm = _norm(direction)
    if norm == 0:
        return {name: torch.zeros_like(logits[name]) for name in logits}
    epsilon = RADIUS / norm

    def at(shift: float) -> Tensors:
        moved = {name: centre[name].detach() + shift * direction[name] for name in centre}
        return _gradient(loss(moved, logits), logits)

    up, down = at(epsilon), at(-epsilon)
    return {name: (up[name] - down[name]) / (2 * epsilon) for name in logits}


def _leaves(tensors: Tensors) -> dict[str, Tensor]:
    """The same memory as the beginning of a graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _gradient(loss: Float[Tensor, ""], tensors: Tensors, create_graph: bool = False) -> dict[str, Tensor]:
    """Gradients by name, zero for what the loss does not depend on."""
    chosen = list(tensors.values())
    found = torch.autograd.grad(loss, chosen, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def _norm(tensors: Tensors) -> float:
    """Norm of all entries together."""
    return float(torch.nn.utils.get_total_norm(list(tensors.values())))


def adam(
    gradient: Float[Tensor, "modules k"], moments: Mapping[str, Any], rate: float
) -> tuple[Float[Tensor, "modules k"], dict[str, Any]]:
    """What Adam takes off the logits, and its new moments."""
    (beta1, beta2), steps = BETAS, moments["steps"] + 1
    first = torch.lerp(gradient, moments["first"], beta1)
    second = torch.lerp(gradient.square(), moments["second"], beta2)
    move = rate * (first / (1 - beta1**steps)) / ((second / (1 - beta2**steps)).sqrt() + 1e-8)
    return move, {"steps": steps, "first": first, "second": second}
