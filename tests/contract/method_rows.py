"""One row per method: what the contract needs to know about it."""

from __future__ import annotations

from dataclasses import dataclass

from lorascope import methods
from lorascope.methods.base import Method


@dataclass(frozen=True)
class MethodRow:
    """Expectations of one method.

    Parameters
    ----------
    method : Method
        Method with hyperparameters for a few steps of a tiny model.
    starts_at_zero : bool
        Whether the logits after ``attach`` equal those of the base.
    folds : bool
        Whether the trained updates can be folded into the weights.
    refused : str
        Words of the error of an export to PEFT; "" if it exports with equal logits.
    killed_after : tuple of str
        Checkpoints, as patterns in the run folder, after which the training is killed.
    killed_at : tuple of int
        Changes of the folder at which it is killed before.
    """

    method: Method
    starts_at_zero: bool = True
    folds: bool = True
    refused: str = ""
    killed_after: tuple[str, ...] = ("resume/step-00000004*",)
    killed_at: tuple[int, ...] = ()


_WHOLE = "it trained the weights themselves"
ROWS = {
    "full": MethodRow(methods.Full(lr=1e-2), refused=_WHOLE),
    "lora": MethodRow(methods.LoRA(rank=2, rslora=True, lr=1e-2, dropout=0.1)),
    "dora": MethodRow(methods.DoRA(rank=2, lr=1e-2, dropout=0.1)),
    "pissa": MethodRow(methods.PiSSA(rank=2, lr=1e-2, dropout=0.1)),
    "vera": MethodRow(methods.VeRA(rank=8, lr=1e-1, dropout=0.1)),
    "adalora": MethodRow(methods.AdaLoRA(init_rank=3, target_rank=2, lr=1e-2)),
    "autolora": MethodRow(
        methods.AutoLoRA(rank=3, lr=1e-2, selection_lr=0.1, dropout=0.1),
        killed_after=("1-search/resume/step-*", "2-retrain/resume/step-*"),
    ),
    "alora": MethodRow(
        methods.ALoRA(
            init_rank=2, prune=5, warm_steps=1, round_steps=1, rounds=3, dropout=0.1, lr=1e-2, fresh_moments=True
        ),
        killed_after=("resume/step-00000002*", "resume/step-00000004*"),
        killed_at=(4,),
    ),
    "fourierft": MethodRow(methods.FourierFT(coefficients=200, targets="all-linear", lr=0.1), starts_at_zero=False),
    "hydralora": MethodRow(
        methods.HydraLoRA(gates_every=1, dropout=0.1, lr=1e-2),
        folds=False,
        refused="depends on its input",
        killed_after=("resume/*",),
    ),
    "lisa": MethodRow(
        methods.LISA(n_active=1, interval=3, weights=(2, 3), lr=1e-2),
        refused=_WHOLE,
        killed_after=("resume/step-00000002*", "resume/step-00000004*"),
    ),
    "neft": MethodRow(methods.NeFT(select_by="random", lr=1e-2), refused=_WHOLE),
    "adapprox": MethodRow(methods.Adapprox(lr=1e-2, min_dim=8, reselect_every=2, growth_scale=None), refused=_WHOLE),
}
