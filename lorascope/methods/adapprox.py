"""Adapprox: Adam whose second moments are kept as thin products, of a rank that is chosen for each matrix.

    V_t = beta_2 max(Q_{t-1} U_{t-1}^T, 0) + (1 - beta_2) G_t^2,    Q_t, U_t = AS-RSI(V_t)
    D_t = G_t / (sqrt(V_t) + eps),    D_t <- D_t / max(1, RMS(D_t) / d)
    M_t = beta_1 M_{t-1} + (1 - beta_1) D_t,    W_t = W_{t-1} - alpha (M_t + lambda W_{t-1})

An optimizer, no adapter: every weight trains. Vectors and small matrices keep their average as it is; the rest of
the step is the same for them. There is no bias correction: at first the clipping by RMS stands in for it.

=============  ============================================================================
paper          here
=============  ============================================================================
beta_1, 2      ``betas``
eps, d         ``eps``, ``clip_threshold``
alpha, lambda  ``lr``, ``weight_decay``
l, p           ``iterations``, ``oversampling``; k + p is rounded up by ``sketch_multiple``
k_init, k_max  ``init_rank``, ``max_rank``: None is a quarter of the smaller side
xi_thresh      ``tolerance``
Delta s        ``reselect_every``
f              ``growth``: eta, omega, phi, tau; times ``growth_scale``
Q, U, M        ``Q``, ``U`` and ``exp_avg`` of a parameter's state; a dense V is ``exp_avg_sq``
=============  ============================================================================

Source: Adapprox (arXiv 2403.14958), algorithms 1 to 3; first and largest rank are inferred from the savings that its
abstract states.

Departs: the text behind the abstract could not be had. Not checked against it are all constants, the rule of the rank
(see ``subspace_iteration``), and the guidance M / (1 - cos(D, M)), whose denominator has a floor here, since the two
are parallel at the first step. Entries that a rank of two or more made negative are set to zero, without which the root
is no number. V is factored in units of its largest entry; where it is all zero, at the first step of LoRA's A for one,
the rank is chosen at the first step at which it is not. Factors, averages and the step itself are in float32 or more,
whatever the weights are. The error is measured at the steps of a choice alone. The method takes ``weight_decay`` from
``train``.

Cost: factors of rank k are smaller than V where k < m n / (m + n); of a square matrix the largest rank takes half, and
a quarter at the least of any other. Of 64 x 64, the smallest that ``min_dim`` lets be factored, these are 8 KiB of 16,
and at rank 1 half a KiB; of 256 x 256, 128 KiB of 256, and 2. A smaller matrix has less than 16 KiB to give, for a step
that takes several times as long as AdamW's at any size, so memory is worth it from about 256 x 256 on; and between two
steps alone, since in the middle of one V is there in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lorascope.methods.base import Method, Step, added_later, parameter_groups
from lorascope.methods.optimizers import subspace_iteration
from lorascope.methods.optimizers.adapprox import AdapproxOptimizer
from lorascope.schema import module_table
from lorascope.schema.records import Item, Quantity, Record, register

SOURCE = "Adapprox, algorithm 2"
register(
    "factor_rank",
    Quantity("rank of the second moment", index="none", pool="sum", definition="columns of its factors", source=SOURCE),
)
register(
    "factor_error",
    Quantity("‖V − QUᵀ‖ / ‖V‖", definition="of this step's V, at a choice of its rank", source=SOURCE),
)
register("factor_trials", Quantity("factorings", pool="sum", definition="for one choice of the rank", source=SOURCE))
register(
    "factor_seconds",
    Quantity("time of a choice", "s", pool="sum", definition="wall-clock time in AS-RSI, for one choice of the rank"),
)
register("factor_norm", Quantity("‖QUᵀ‖", pool="norm", definition="Frobenius norm of the factored second moment"))
register(
    "factor_share",
    Quantity("k / k_max", definition="columns of the factors over the most that a choice may take", source=SOURCE),
)
register("factor_bytes", Quantity("factors of V", "bytes", pool="sum", definition="bytes that Q and U hold"))
register(
    "negative_share",
    Quantity("negative entries", definition="share of the entries of Q U^T below zero, before they are set to it"),
)
register(
    "negative_mass",
    Quantity("negative mass", definition="share of these entries in the sum of the magnitudes of all"),
)
register(
    "direction_rms", Quantity("RMS of the direction", definition="root mean square of G / (sqrt(V) + eps), not clipped")
)
register(
    "direction_cosine",
    Quantity("cos(D, M)", definition="of the clipped direction and the first moment of this step"),
)


@dataclass(kw_only=True)
class Adapprox(Method, name="adapprox"):
    """Full fine-tuning under ``AdapproxOptimizer``.

    Parameters
    ----------
    betas : (float, float)
        Of first and second moment; no first moment is kept where the first is zero.
    eps : float
        Added to the root of the second moment.
    clip_threshold : float
        Largest RMS of a direction.
    iterations, oversampling : int
        Rounds of S-RSI, and columns beyond the rank.
    sketch_multiple : int
        Rank and spare columns together are rounded up to a multiple of it: 16 may be faster, and draws other sketches.
    init_rank : int
        At the first step, and where every choice begins.
    max_rank : int or None
        None is a quarter of the smaller side.
    tolerance : float
        Relative error at which a rank is large enough.
    reselect_every : int
        Steps between two choices.
    rank_rule : {"restart", "colnorm", "ema", "fixed"}
        How a rank is chosen; see ``subspace_iteration``.
    growth : (float, float, float, float)
        eta, omega, phi, tau of f, by which "restart" goes up.
    growth_scale : float or None
        Multiplies f; None goes by the width.
    denominator : {"pre", "post"}
        Divide by V before factoring, or by what the factors say of it.
    cosine : bool
        Guidance: divide M by 1 - cos(D, M).
    cosine_floor : float
        Least that guidance divides by.
    min_dim : int or None
        Matrices with a smaller side keep a dense average; None factors none.
    dense : str or tuple of str
        Roles or modules whose second moment is kept as it is, such as a large embedding; see ``names.match``.
    sketch_seed : int
        Of the sketches alone.
    """

    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    clip_threshold: float = 1.0
    iterations: int = 5
    oversampling: int = 5
    sketch_multiple: int = field(default=1, metadata=added_later())
    init_rank: int = 1
    max_rank: int | None = None
    tolerance: float = 0.01
    reselect_every: int = 10
    rank_rule: Literal["restart", "colnorm", "ema", "fixed"] = "restart"
    growth: tuple[float, ...] = subspace_iteration.LOGISTIC
    growth_scale: float | None = 1.0
    denominator: Literal["pre", "post"] = "pre"
    cosine: bool = False
    cosine_floor: float = 0.1
    min_dim: int | None = 64
    dense: str | tuple[str, ...] = ()
    sketch_seed: int = 0

    def attach(self, model: nn.Module) -> None:
        """Leave everything trainable."""
        model.requires_grad_(True)

    def optimizer(self, model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> AdapproxOptimizer:
        """``AdapproxOptimizer`` in the groups ``adapter`` and ``head``; what is to stay dense in groups of its own."""
        chosen = module_table.match(module_table.describe(model), self.dense, "dense") if self.dense else []
        dense = {id(parameter) for name in chosen for parameter in model.get_submodule(name).parameters()}
        groups = []
        for group in parameter_groups(model, lr, head_lr, weight_decay):
            for kept, own in ((False, {}), (True, {"min_dim": None})):
                if members := [p for p in group["params"] if (id(p) in dense) == kept]:
                    groups.append(group | own | {"params": members})
        theirs = {f.name for f in dataclasses.fields(Method)} | {"dense", "sketch_seed"}
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in theirs}
        return AdapproxOptimizer(groups, lr, weight_decay=weight_decay, seed=self.sketch_seed, **options)

    def records(self, step: Step) -> Iterable[Item]:
        """What became of every factored matrix where its rank was chosen, and what is held of it at the last step."""
        for name, parameter in step.model.named_parameters():
            state = step.optimizer.state.get(parameter, {})
            if "Q" not in state or not ("chosen" in state or step.last):
                continue
            module, (Q, U) = name.removesuffix(".weight"), (state["Q"], state["U"])
            yield Record("factor_rank", Q.shape[1], module)
            yield Record("factor_bytes", Q.nbytes + U.nbytes, module)
            yield Record("direction_rms", float(state["rms"]), module)
            yield Record("factor_norm", float(U.norm()), module)  # Q has orthonormal columns
            fixed, most = (
                self.rank_rule == "fixed",
                subspace_iteration.largest_rank(Q.shape[0], U.shape[0], self.max_rank),
            )
            yield Record("factor_share", 1.0 if fixed else Q.shape[1] / most, module)
            if "cosine" in state:  # without a first moment there is none
                yield Record("direction_cosine", float(state["cosine"]), module)
            if "chosen" in state:
                yield Record("factor_error", state["error"], module)
                yield Record("factor_trials", state["trials"], module)
                yield Record("factor_seconds", state["seconds"], module)
                yield Record("negative_share", state["negative"], module)
                yield Record("negative_mass", state["negative_mass"], module)
