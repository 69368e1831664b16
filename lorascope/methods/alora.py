r"""ALoRA: the components with the lowest ablation scores are deleted, and modules that lost none receive new ones.

ALoRA is Allocating LoRA; PEFT's aLoRA is Activated LoRA, another method. Every module starts with the same small rank,
so the budget is met from the first step on. Up to N_A rounds follow, the first after K_1 steps and then one every K_2
steps. A round scores each component r on one batch of the search split, without r and with r as the only component:

.. math::

    \operatorname{IS}(r) = S(M) - S(M_{\setminus r}) + S(M_r), \qquad S = -\text{loss}

It deletes the n_A components with the lowest IS and distributes as many new ones evenly over the modules that lost
none. The remainder goes to the modules with the highest mean IS. Retained factors and their moments do not change.

=========  ==========================================================
paper      here
=========  ==========================================================
r_init     ``init_rank``
n_A        ``prune``
N_A        ``rounds``
K_1, K_2   ``warm_steps``, ``round_steps``
B_val      ``score_rows`` rows of the search split
M          the model with all components
M\\r, M_r   the model without r; the model with only r
=========  ==========================================================

Source: ALoRA (arXiv 2403.16187), equation 6 (IS), section 3.4, algorithm 1 and footnotes 2 to 4 (rounds), section 4.3
(defaults), appendix E (rate).

Departs:

- There are no gates. They are always 1 or 0 in the paper's own runs, and a component with gate 0 is the same map as a
  deleted one.
- Epochs are fractions of the run: the warm stage is a tenth (1 epoch of 10), a round a fortieth (0.25 of 10). There
  are fewer than 8 rounds if 8 would extend beyond 60% of the run.
- Training does not stop early, and all steps of the run are taken; the paper stops by the development set.
- N_mod, and so n_A, reads in the paper as the number of modules of a block and also of the network; ``prune`` accepts
  both.
- Components are scored on rows of the train split that are not trained on; the paper uses the development set.
- ``scores="random"`` is an additional control: the same rounds, but components have uniform random scores.
- ``scores="sensitivity"``, a variant of table 6, is AdaLoRA's score of gate, row of A and column of B, from gradients
  before clipping. The averages of new components start at zero.
- New components inherit Adam's step count, so their bias correction is nearly 1 and their first step can be 3.2 lr;
  ``fresh_moments`` counts the steps of each component instead.

The paper leaves these rules open:

- The scale is alpha / ``init_rank`` throughout.
- New components are initialized as at the start: A Kaiming-uniform, B zero, moments zero.
- A module is "un-pruned" if it lost no component in the same round. A module of rank 0 receives no component.
- Ties go to the earlier module, then position.
- All rounds use the same batch.
- The last component of the model is never deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapters.ablation import ablation_scores
from lorascope.adapters.delta import resize, to_array
from lorascope.array_types import Float, Int
from lorascope.methods.adalora import smooth
from lorascope.methods.field_checks import (
    default_if_none,
    is_integer,
    require,
    require_integer,
    require_literals,
    require_scaling,
)
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import AdapterMethod, Step, added_later, parameter_groups
from lorascope.methods.optimizers import closure_loss, parameters_with_gradient
from lorascope.methods.precision import wide_dtype
from lorascope.schema.records import Item, Quantity, Record, register

register(
    "train ALoRA",
    "ALoRA, eq. 6",
    score_without=Quantity(
        "S(M\\r)", "nats", "rank_id", definition="negative loss of the scoring batch without this component"
    ),
    score_only=Quantity(
        "S(M_r)", "nats", "rank_id", definition="negative loss of the scoring batch with only this component"
    ),
    score_full=Quantity("S(M)", "nats", "none", definition="negative loss of the scoring batch with all components"),
    score_none=Quantity("S(M₀)", "nats", "none", definition="negative loss of the scoring batch without any component"),
)


BETAS = (0.85, 0.85)  # of the moving averages of AdaLoRA's score


@dataclass(kw_only=True)
class ALoRA(AdapterMethod, name="alora"):
    """Low-rank adaptation that moves components between modules by ablation scores.

    Parameters
    ----------
    init_rank : int
        Initial number of components per module.
    alpha : float
        Scaling: the update is multiplied by alpha / init_rank throughout.
    dropout : float
        Dropout probability on the input of A.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``ls.module_table.match``.
    prune : int, "block" or "network"
        Components deleted per round: a number, or the number of adapted modules of a block or of the network.
    rounds : int, optional
        Rounds of deletion and growth; by default 8, or as many as fit in 60% of the run.
    warm_steps : int, optional
        Steps before the first round; by default a tenth of the run.
    round_steps : int, optional
        Steps between two rounds; by default a fortieth of the run.
    score_rows : int
        Number of rows of the search split on which components are scored.
    fresh_moments : bool
        Whether Adam's bias correction counts the steps of each component; False counts the steps of the run.
    scores : {"ablation", "random", "sensitivity"}
        Scores of the components: IS, or without forward passes random numbers from the run's seed, or AdaLoRA's score.
    """

    init_rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    prune: int | str = "block"
    rounds: int | None = None
    warm_steps: int | None = None
    round_steps: int | None = None
    score_rows: int = 32
    search_share: float = 0.1
    fresh_moments: bool = field(default=False, metadata=added_later())
    scores: Literal["ablation", "random", "sensitivity"] = field(default="ablation", metadata=added_later())
    lr: float = 1e-4
    head_lr: float = 1e-4

    def __post_init__(self) -> None:
        require_integer(self, 1, "init_rank", "rounds", "warm_steps", "round_steps", "score_rows")
        require_scaling(self)
        if self.search_share <= 0:
            raise ValueError(f"search_share must be > 0, got {self.search_share}: the search split scores components")
        number = not isinstance(self.prune, str) and is_integer(self.prune) and self.prune >= 1
        valid = number or self.prune in ("block", "network")
        require(self, "prune", "'block', 'network' or an integer >= 1", valid)
        require_literals(self)

    @classmethod
    def example(cls) -> ALoRA:
        return cls(init_rank=1, prune=5, score_rows=4, fresh_moments=True, dropout=0.1, lr=1e-2)

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; leave adapters and head trainable."""
        super().attach(model)
        self._round: list[Item] = []
        # The id of a component counts all components that its module ever had, so it stays unique after deletions.
        self.rank_ids_ = {name: list(range(self.init_rank)) for name in self._deltas}
        self.born_ = dict.fromkeys(self._deltas, self.init_rank)
        if self.scores == "random":
            # Spawn a generator: the data order uses the same seed.
            self.generator_ = np.random.default_rng(np.random.SeedSequence(torch.initial_seed()).spawn(1)[0])
        if self.scores == "sensitivity":
            # Moving averages of sensitivity and uncertainty, one row per component.
            self.averages_ = {}
            for name, delta in self._deltas.items():
                weights, _ = gated_rows(delta)
                self.averages_[name] = [[torch.zeros_like(rows) for rows in weights] for _ in range(2)]

    def select_targets(self, modules: pd.DataFrame) -> list[str]:
        """Return the modules to adapt, and compute n_A, the number of components deleted per round."""
        names = super().select_targets(modules)
        adapted = modules[modules["module"].isin(names) & modules["layer"].notna()]
        # Encoder and decoder number their layers separately, so a block is a stack and a layer.
        in_block = max(adapted.groupby(["stack", "layer"]).size(), default=len(names))
        number = int({"block": in_block, "network": len(names)}.get(str(self.prune), self.prune))
        total = len(names) * self.init_rank
        if number >= total:
            raise ValueError(f"prune must be < {total}, the number of components, got {self.prune!r} ({number})")
        self._pruned = number
        return names

    def delta(self, name: str, host: nn.Module) -> ALoRADelta:
        """Return B A of one module with the initial rank."""
        # With alpha over the current rank, a new component would shrink the update by the retained ones.
        return ALoRADelta(host, self.init_rank, self.alpha / self.init_rank, self.dropout)

    def optimizer(self, model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return AdamW, with a step count per component if ``fresh_moments``."""
        if not self.fresh_moments:
            return super().optimizer(model, lr, head_lr, weight_decay)
        return CountingAdamW(parameter_groups(model, lr, head_lr, weight_decay), lr)

    def schedule(self, total: int) -> range:
        """Return the numbers of finished steps at which a round takes place, all of them before the end of the run."""
        warm = default_if_none(self.warm_steps, max(1, round(total / 10)))
        every = default_if_none(self.round_steps, max(1, round(total / 40)))
        # The paper's 8 rounds, or as many as fit in 60% of the run.
        fitting = (6 * total // 10 - warm) // every + 1
        rounds = default_if_none(self.rounds, max(1, min(8, fitting)))
        last = warm + (rounds - 1) * every
        if last >= total:
            sizes = f"{total}, the steps of the run, got {warm} + {rounds - 1} * {every}"
            raise ValueError(f"warm_steps + (rounds - 1) * round_steps must be < {sizes}")
        return range(warm, last + 1, every)

    @torch.no_grad()
    def after_backward(self, step: Step) -> None:
        """Update the moving averages if they score the components."""
        if self.scores == "sensitivity":
            for name, delta in self._deltas.items():
                sensitivity, uncertainty = self.averages_[name]
                smooth(sensitivity, uncertainty, *gated_rows(delta), BETAS)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Score, delete and add components if a round is due."""
        self._round = []
        if step.finished not in self.schedule(step.total):
            return
        columns = self._score(step)
        for name, ids in self.rank_ids_.items():
            for quantity, values in columns.items():
                if ids:
                    self._round.append(Record(quantity, values[name], name, np.array(ids)))
        scores = list(columns["importance"].values())
        lost = prune(scores, self._pruned)
        gained = allocate(scores, lost)
        for name, positions, new in zip(self._deltas, lost, gained.tolist(), strict=True):
            if len(positions) or new:
                self._reshape(step, name, positions, new)

    def _score(self, step: Step) -> dict[str, Mapping[str, Float[np.ndarray, "_"]]]:
        """Return the scores of all components by module, by the quantity that records them."""
        if self.scores == "random":
            return {"importance": {name: self.generator_.random(len(ids)) for name, ids in self.rank_ids_.items()}}
        if self.scores == "sensitivity":
            sums = {}
            for name, averages in self.averages_.items():
                products = torch._foreach_mul(*averages)
                sums[name] = to_array(torch.stack([rows.mean(1, dtype=torch.float64) for rows in products]).sum(0))
            return {"importance": sums}
        # The same rows in all rounds: algorithm 1 has one B_val.
        S = ablation_scores(step.model, step.loss, step.validation(self.score_rows, fixed=True))
        self._round = [Record("score_full", S.full), Record("score_none", S.none)]
        scores = {name: importance_score(S.full, S.without[name], S.only[name]) for name in self._deltas}
        return {"importance": scores, "score_without": S.without, "score_only": S.only}

    def _reshape(self, step: Step, name: str, lost: Int[np.ndarray, "_"], new: int) -> None:
        """Delete and append components of one module: factors, moments and ids."""
        delta, ids = self._deltas[name], self.rank_ids_[name]
        retained = np.delete(np.arange(delta.rank), lost).tolist()
        # Drawn only if needed, because a draw changes the random numbers of training.
        fresh = ALoRADelta(step.model.get_submodule(name), new).factors() if new else {}
        resize(delta.A, step.optimizer, retained, fresh.get("A"), 0)
        resize(delta.B, step.optimizer, retained, fresh.get("B"), 1)
        if self.scores == "sensitivity":
            for tensors in self.averages_[name]:
                tensors[:] = [torch.cat([rows[retained], rows.new_zeros(new, rows.shape[1])]) for rows in tensors]
        born = self.born_[name]
        self.rank_ids_[name] = [*(ids[position] for position in retained), *range(born, born + new)]
        self.born_[name] = born + new

    def records(self, step: Step) -> Iterable[Item]:
        """Yield ranks and budget at the start, at every round and at the end; at rounds also the scores."""
        rounds = self.schedule(step.total)
        if step.finished and not step.last and step.finished not in rounds:
            return
        yield from self._round
        yield Record("budget", sum(delta.rank for delta in self._deltas.values()))
        for name, delta in self._deltas.items():
            yield Record("rank", delta.rank, name)

    def settled(self, step: Step) -> bool:
        """Return whether the last round has taken place."""
        return step.finished >= self.schedule(step.total)[-1]


class ALoRADelta(LoRADelta):
    """ALoRA's update scale * B A of one module, whose rank may change and may become 0."""

    resized = True

    def affine(
        self, x: Float[Tensor, "*batch in"], W: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*batch out"]:
        return super().affine(x, W, b) if self.rank else F.linear(x, W, b)

    def add_component(self, index: int, sign: int, x: Tensor, y: Tensor) -> Tensor:
        """Return the host's output ``y`` at input ``x`` with a component added (sign 1) or removed (-1)."""
        row, column = self.A[index : index + 1], self.B[:, index]
        is_lookup = not x.is_floating_point()
        coordinate = F.embedding(x, row.T, self.padding) if is_lookup else F.linear(x.to(row.dtype), row)
        return torch.addcmul(y, coordinate, column, value=sign * self.scale).to(y.dtype)

    def is_idle(self, index: int) -> bool:
        """Return whether the component adds zero for any input."""
        return not (self.A[index].any() and self.B[:, index].any())


def gated_rows(delta: ALoRADelta) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of ALoRA's components and their gradients: rows of A, columns of B, gates of 1."""
    A, B = delta.A.detach(), delta.B.detach().T
    dA, dB = torch.zeros_like(A), torch.zeros_like(delta.B)
    # A module that the batch did not use has no gradient, which counts as zero.
    if delta.A.grad is not None and delta.B.grad is not None:
        dA, dB = delta.A.grad, delta.B.grad
    # A gate multiplies its row of A, so its derivative is the product of the row and its gradient.
    return [A, B, torch.ones_like(A[:, :1])], [dA, dB.T, (A * dA).sum(1, keepdim=True)]


class CountingAdamW(torch.optim.AdamW):
    """AdamW of ALoRA with a step count per entry: the bias correction of an appended entry starts at its first step.

    ``resize`` appends zeros to the counts as it does to the moments.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = closure_loss(closure)
        for group, parameter in parameters_with_gradient(self):
            state, (beta1, beta2) = self.state[parameter], group["betas"]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
                # A count in bfloat16 would stop at 256.
                state["steps"] = torch.zeros_like(parameter, dtype=wide_dtype(parameter))
            m, v, steps = state["exp_avg"], state["exp_avg_sq"], state["steps"]
            steps += 1
            m.lerp_(parameter.grad, 1 - beta1)
            v.lerp_(parameter.grad.square(), 1 - beta2)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])  # decoupled, before the step as in torch
            size = (v / (1 - beta2**steps)).sqrt_().add_(group["eps"])
            parameter.addcdiv_(m / (1 - beta1**steps), size, value=-group["lr"])
        return loss


def importance_score(
    full: float, without: Float[np.ndarray, "rank"], only: Float[np.ndarray, "rank"]
) -> Float[np.ndarray, "rank"]:
    """Compute ALoRA's importance score IS of the components of a module: equation 6."""
    return full - without + only


def prune(scores: Sequence[Float[np.ndarray, "_"]], number: int) -> list[Int[np.ndarray, "_"]]:
    """Return the positions that ALoRA prunes: the ``number`` lowest scores over all modules, by module.

    Ties go to the earlier module, then position. The highest score is never among them.
    """
    sizes = [len(score) for score in scores]
    # The stable sort breaks ties by module and position, and the last component of the model is never deleted.
    lowest = np.argsort(np.concatenate(scores), kind="stable")[: min(number, sum(sizes) - 1)]
    is_lost = np.zeros(sum(sizes), dtype=bool)
    is_lost[lowest] = True
    by_module = np.split(is_lost, np.cumsum(sizes)[:-1])
    return [np.flatnonzero(module) for module in by_module]


def allocate(
    scores: Sequence[Float[np.ndarray, "_"]], lost: Sequence[Int[np.ndarray, "_"]]
) -> Int[np.ndarray, "modules"]:
    """Allocate as many components as ALoRA pruned: evenly over the modules that lost none, the rest by mean score."""
    number = sum(map(len, lost))
    gained = np.zeros(len(scores), dtype=np.int64)
    unpruned = [module for module, score in enumerate(scores) if len(score) and not len(lost[module])]
    # Footnote 3: the modules with the highest mean IS get the remainder; the stable sort keeps ties in order.
    unpruned.sort(key=lambda module: -scores[module].mean())
    # If every module lost a component, nothing is added, and the total rank falls: footnote 4.
    for position, module in enumerate(unpruned):
        share, remainder = divmod(number, len(unpruned))
        gained[module] = share + (position < remainder)
    return gained
