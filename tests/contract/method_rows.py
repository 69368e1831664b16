"""One row per method: what the contract needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorascope import methods
from lorascope.methods.method import Method


@dataclass(frozen=True)
class MethodRow:
    """Expectations of one method.

    Parameters
    ----------
    method : Method
        Method with hyperparameters for a few steps of a tiny model.
    others : mapping of str to Method
        Methods with other kinds of values, by their labels.
    starts_at_zero : bool
        Whether the logits after ``attach`` equal those of the base.
    folds : bool
        Whether the trained updates can be folded into the weights.
    empties : bool
        Whether a module ends with rank 0.
    killed_after : tuple of str
        Checkpoints, as patterns in the run folder, after which the training is killed.
    killed_at : tuple of int
        Changes of the folder at which it is killed before.
    """

    method: Method
    others: Mapping[str, Method] = field(default_factory=dict)
    starts_at_zero: bool = True
    folds: bool = True
    empties: bool = False
    killed_after: tuple[str, ...] = ("resume/step-00000004*",)
    killed_at: tuple[int, ...] = ()


ROWS = {
    "full": MethodRow(methods.Full(lr=1e-2), {"Full, optimizer_name came": methods.Full(optimizer_name="came")}),
    "lora": MethodRow(
        methods.LoRA(rank=2, rslora=True, lr=1e-2, dropout=0.1),
        {
            "LoRA, rank by module, targets q": methods.LoRA(rank={"a.b": 3}, targets=("q",)),
            "LoRA, dropout 0.1, targets all-linear": methods.LoRA(dropout=0.1, targets="all-linear"),
        },
    ),
    "dora": MethodRow(methods.DoRA(rank=2, lr=1e-2, dropout=0.1)),
    "pissa": MethodRow(methods.PiSSA(rank=2, lr=1e-2, dropout=0.1)),
    "vera": MethodRow(methods.VeRA(rank=8, lr=1e-1, dropout=0.1)),
    "adalora": MethodRow(
        methods.AdaLoRA(init_rank=3, target_rank=1, initial_steps=0, final_steps=2, mask_every=1, dropout=0.1, lr=1e-2),
        {"AdaLoRA, penalty sum-square, scores before": methods.AdaLoRA(penalty="sum-square", scores="before")},
        empties=True,
    ),
    "autolora": MethodRow(
        methods.AutoLoRA(rank=3, lr=1e-2, selection_lr=0.1, dropout=0.1),
        {
            "AutoLoRA, rank 4, targets q k, hypergradient exact": methods.AutoLoRA(
                rank=4, hypergradient="exact", targets=("q", "k")
            )
        },
        killed_after=("1-search/resume/step-*", "2-retrain/resume/step-*"),
    ),
    "alora": MethodRow(
        methods.ALoRA(
            init_rank=1, prune=5, warm_steps=1, round_steps=1, rounds=3, dropout=0.1, lr=1e-2, fresh_moments=True
        ),
        {
            "ALoRA, prune 3, rounds 2": methods.ALoRA(prune=3, rounds=2),
            "ALoRA, targets q, prune network": methods.ALoRA(prune="network", targets=("q",)),
        },
        empties=True,
        killed_after=("resume/step-00000002*", "resume/step-00000004*"),
        killed_at=(4,),
    ),
    "fourierft": MethodRow(
        methods.FourierFT(coefficients=200, targets="all-linear", lr=0.1),
        {
            "FourierFT, coefficients 9, center 3.5, init zeros, basis random": methods.FourierFT(
                coefficients=9, center=3.5, init="zeros", basis="random"
            )
        },
        starts_at_zero=False,
    ),
    "hydralora": MethodRow(
        methods.HydraLoRA(gates_every=1, dropout=0.1, lr=1e-2),
        {
            "HydraLoRA, num_experts 7, targets q, shared_a False, router uniform": methods.HydraLoRA(
                num_experts=7, targets=("q",), shared_a=False, router="uniform"
            )
        },
        folds=False,
        killed_after=("resume/*",),
    ),
    "lisa": MethodRow(
        methods.LISA(n_active=1, interval=3, weights=(2, 3), lr=1e-2),
        {
            "LISA, n_active 0, interval 9, moment_policy keep, weights 1.5 2, draw_seed 4": methods.LISA(
                n_active=0, interval=9, moment_policy="keep", weights=(1.5, 2), draw_seed=4
            )
        },
        killed_after=("resume/step-00000002*", "resume/step-00000004*"),
    ),
    "neft": MethodRow(
        methods.NeFT(num_neurons=9, lr=1e-2),
        {
            "NeFT, num_neurons 5, select_by reversed": methods.NeFT(num_neurons=5, select_by="reversed"),
            "NeFT, neurons by module, tune_lr 0.0001": methods.NeFT(neurons={"a.b": [0, 3]}, tune_lr=1e-4),
        },
        killed_after=("1-tune/resume/step-*", "2-masked/resume/step-*"),
    ),
    "adapprox": MethodRow(
        methods.Adapprox(lr=1e-2, min_dim=8, reselect_every=2, growth_scale=None),
        {
            "Adapprox, betas 0 0.99, rank_rule colnorm, min_dim None, dense embed": methods.Adapprox(
                betas=(0.0, 0.99), rank_rule="colnorm", min_dim=None, dense=("embed",)
            ),
            "Adapprox, sketch_multiple 16": methods.Adapprox(sketch_multiple=16),
        },
    ),
}
