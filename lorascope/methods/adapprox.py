r"""Adapprox: Adam with low-rank second moments whose rank is selected per matrix.

.. math::

    V_t &= \beta_2 \max(Q_{t-1} U_{t-1}^\top, 0) + (1 - \beta_2) G_t^2, \qquad
        Q_t, U_t = \operatorname{AS-RSI}(V_t) \\
    D_t &= \frac{G_t}{\sqrt{V_t} + \epsilon}, \qquad D_t \leftarrow \frac{D_t}{\max(1, \operatorname{RMS}(D_t) / d)} \\
    M_t &= \beta_1 M_{t-1} + (1 - \beta_1) D_t, \qquad W_t = W_{t-1} - \alpha (M_t + \lambda W_{t-1})

Adapprox is an optimizer, not an adapter: every weight trains. Second moments of vectors and small matrices are stored
without factors; the rest of the step is the same for them. There is no bias correction; at first, clipping by RMS
replaces it.

=============  ============================================================================
paper          here
=============  ============================================================================
beta_1, 2      ``betas``
eps, d         ``eps``, ``clip_threshold``
alpha, lambda  ``lr``, ``weight_decay``
l, p           ``iterations``, ``oversampling``; ``sketch_multiple`` rounds k + p up
k_init, k_max  ``init_rank``, ``max_rank``: None is a quarter of the smaller side
xi_thresh      ``tolerance``
Delta s        ``reselect_every``
f              ``growth``: eta, omega, phi, tau; times ``growth_scale``
Q, U, M        ``Q``, ``U`` and ``exp_avg`` of a parameter's state; V without factors: ``exp_avg_sq``
=============  ============================================================================

Source: Adapprox (arXiv 2403.14958), algorithms 1 to 3; initial and largest rank are inferred from the savings that its
abstract states.

Departs:

- Only the abstract of the paper was available. These are not checked against its text: all constants, the rank rule
  (see ``subspace_iteration``) and the guidance M / (1 - cos(D, M)).
- The denominator of the guidance has a floor, because D and M are parallel at the first step.
- Negative entries of Q U^T, which occur at rank 2 or more, are set to zero; the square root needs this.
- V is factored in units of its largest entry.
- While V is all zero, as for LoRA's A at the first step, it is not factored; the first nonzero V selects the rank.
- Factors, averages and the step itself use float32 or wider, regardless of the dtype of the weights.
- The error is measured only at steps that select a rank.
- The method takes ``weight_decay`` from ``train``.

Cost: factors of rank k are smaller than V if k < m n / (m + n). At the largest rank they take half the memory of V for
a square matrix, and between a quarter and a half for any other. By default 64 x 64 is the smallest factored matrix: its
factors take 8 KiB of 16 at the largest rank and 0.5 KiB at rank 1. For 256 x 256 they take 128 KiB of 256, and 2 KiB.
A square matrix below the default ``min_dim`` could save less than 16 KiB, and a step takes several times as long as
AdamW's at any size. The saving pays off from about 256 x 256 on, and only between steps: during a step V exists in
full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from lorascope.methods.method import Method, Step, added_later, parameter_groups
from lorascope.methods.optimizers.adapprox import AdapproxOptimizer, check_options
from lorascope.methods.optimizers.subspace_iteration import LOGISTIC, max_factor_rank
from lorascope.schema import module_table
from lorascope.schema.fused_parts import PART_ROLES
from lorascope.schema.records import Item, Quantity, Record, register

_SELECTION = "wall-clock time of AS-RSI in one rank selection"
_NEGATIVE = "fraction of negative entries of Q U^T, before they are set to zero"
_RMS = "root mean square of G / (sqrt(V) + eps), before clipping"
_COSINE = "cosine of the clipped direction and the first moment of this step"
register(
    "train with Adapprox and a min_dim that a weight matrix reaches on both sides",
    "Adapprox, algorithm 2",
    factor_rank=Quantity("rank of the second moment", pool="sum", definition="number of columns of Q and U"),
    factor_error=Quantity("‖V − QUᵀ‖ / ‖V‖", definition="relative error of this step's V, at a rank selection"),
    factor_trials=Quantity("factorizations", pool="sum", definition="number in one rank selection"),
    factor_share=Quantity("k / k_max", definition="number of columns of Q and U divided by the largest rank"),
)
register(
    "train with Adapprox and a min_dim that a weight matrix reaches on both sides",
    factor_seconds=Quantity("selection time", "s", pool="sum", definition=_SELECTION),
    factor_norm=Quantity("‖QUᵀ‖", pool="norm", definition="Frobenius norm of the factored second moment"),
    factor_bytes=Quantity("factors of V", "bytes", pool="sum", definition="bytes of Q and U"),
    negative_share=Quantity("negative entries", definition=_NEGATIVE),
    negative_mass=Quantity("negative mass", definition="fraction of the sum of |Q U^T| in negative entries"),
    direction_rms=Quantity("RMS of the direction", definition=_RMS),
    direction_cosine=Quantity("cos(D, M)", definition=_COSINE),
)


__all__ = ["Adapprox", "AdapproxOptimizer"]


@dataclass(kw_only=True)
class Adapprox(Method, name="adapprox"):
    """Full fine-tuning with low-rank second moments, by ``AdapproxOptimizer``.

    Parameters
    ----------
    betas : (float, float)
        Decay of first and second moment; no first moment is stored if its decay is 0.
    eps : float
        Number added to the square root of the second moment.
    clip_threshold : float
        Maximum RMS of a direction G / (sqrt(V) + eps).
    iterations, oversampling : int
        Power iterations of S-RSI, and sketch columns beyond the rank.
    sketch_multiple : int
        The number of sketch columns is rounded up to a multiple of it. 16 may be faster, but draws other sketches.
    init_rank : int
        Rank at which every selection of "restart" starts; with "fixed", the rank itself.
    max_rank : int or None
        Largest rank of a selection; None is a quarter of the smaller side.
    tolerance : float
        Relative error up to which a rank is accepted.
    reselect_every : int
        Steps between two rank selections.
    rank_rule : {"restart", "colnorm", "ema", "fixed"}
        Rule that selects the rank; see ``subspace_iteration``.
    growth : (float, float, float, float)
        eta, omega, phi, tau of f, the rank increment of "restart".
    growth_scale : float or None
        Factor of f; None is (k_max - 1) / 191, for matrices narrower than the paper's.
    denominator : {"pre", "post"}
        Whether the step divides by V before factoring, or by the product of its factors.
    cosine : bool
        Whether guidance divides M by 1 - cos(D, M).
    cosine_floor : float
        Minimum divisor of guidance.
    min_dim : int or None
        Matrices with a side below it store V without factors; None factors no matrix.
    dense : str or tuple of str
        Roles or modules that store V without factors, such as a large embedding; see ``ls.module_table.match``.
    sketch_seed : int
        Seed of the sketches; nothing else uses it.
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
    growth: tuple[float, ...] = LOGISTIC
    growth_scale: float | None = 1.0
    denominator: Literal["pre", "post"] = "pre"
    cosine: bool = False
    cosine_floor: float = 0.1
    min_dim: int | None = 64
    dense: str | tuple[str, ...] = ()
    sketch_seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def example(cls) -> Adapprox:
        return cls(min_dim=8, reselect_every=2, growth_scale=None, lr=1e-2)

    def attach(self, model: nn.Module) -> None:
        """Make every parameter trainable."""
        model.requires_grad_(True)

    def optimizer(self, model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> AdapproxOptimizer:
        """Return ``AdapproxOptimizer`` with groups ``adapter`` and ``head``, each split if it has ``dense`` modules."""
        dense: set[nn.Parameter] = set()
        if self.dense:
            modules = module_table.describe(model)
            if "qkv" in set(modules["role"]) and not set(PART_ROLES).isdisjoint(self.dense):
                raise ValueError(
                    "dense must not be a part (q, k, v) of a fused weight: Adapprox has one step for the whole weight. "
                    'Use "qkv"'
                )
            for name in module_table.match(modules, self.dense, "dense"):
                dense.update(model.get_submodule(name).parameters())
        groups = []
        for group in parameter_groups(model, lr, head_lr, weight_decay):
            factored = [parameter for parameter in group["params"] if parameter not in dense]
            unfactored = [parameter for parameter in group["params"] if parameter in dense]
            groups.append(group | {"params": factored})
            groups.append(group | {"params": unfactored, "min_dim": None})  # None factors no matrix
        groups = [group for group in groups if group["params"]]
        not_options = {f.name for f in dataclasses.fields(Method)} | {"dense", "sketch_seed"}
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in not_options}
        return AdapproxOptimizer(groups, lr, weight_decay=weight_decay, seed=self.sketch_seed, **options)

    def records(self, step: Step) -> Iterable[Item]:
        """Yield rank and direction of each factored matrix at selections and at the end, its error at selections."""
        for name, parameter in step.model.named_parameters():
            state = step.optimizer.state.get(parameter, {})
            if "Q" not in state or not ("chosen" in state or step.last):
                continue
            Q, U = state["Q"], state["U"]
            k_max = max_factor_rank(Q.shape[0], U.shape[0], self.max_rank)
            values = {
                "factor_rank": Q.shape[1],
                "factor_bytes": Q.nbytes + U.nbytes,
                "direction_rms": float(state["rms"]),
                "factor_norm": float(U.norm()),  # equals |Q U^T|: Q has orthonormal columns
                "factor_share": 1.0 if self.rank_rule == "fixed" else Q.shape[1] / k_max,
            }
            if "cosine" in state:  # absent without a first moment
                values["direction_cosine"] = float(state["cosine"])
            if "chosen" in state:
                for key in ("error", "trials", "seconds"):
                    values[f"factor_{key}"] = state[key]
                values["negative_share"], values["negative_mass"] = state["negative"], state["negative_mass"]
            for quantity, value in values.items():
                yield Record(quantity, value, name.removesuffix(".weight"))

    def describe(self) -> dict[str, Any]:
        """Return the common facts, with a note on the second moments that are stored without factors."""
        if self.min_dim is None:
            dense = "all parameters"
        else:
            roles = (self.dense,) if isinstance(self.dense, str) else self.dense
            kinds = ["vectors", *roles]
            if self.min_dim > 1:
                kinds.append("small matrices")
            dense = " and ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
        return super().describe() | {"caption_notes": [f"keeps {dense} dense"]}
