"""Requirements of figures, as data: how each record is found in a run, and how to get it if it is missing."""

from __future__ import annotations

from collections.abc import Callable, Sized

from lorascope.analysis import fourier
from lorascope.analysis.spectra import singular_values
from lorascope.runs.result import Result

UPDATES, SPECTRA, FREQUENCIES, BASIS, HEADS = "updates", "spectra", "frequencies", "basis", "heads"
OF_UPDATES = frozenset({UPDATES, SPECTRA, "update_norm", "learned_norm", "relative_update", "weight_norm", "step_norm"})
"""Needs of figures that show updates."""

_WAYS = {
    "train with a method that has factors, such as LoRA": (UPDATES,),
    "train with observe=[ls.observe.norms()]": (*OF_UPDATES - {UPDATES}, "adapter_norm"),
    "train with FourierFT": (FREQUENCIES, BASIS),
    "train HydraLoRA": (HEADS, "gate_entropy"),
    "train HydraLoRA on a task with groups": ("gate_information",),
    "train adapters with observe=[ls.observe.norms()]": ("rank",),
    "train with observe=[ls.observe.memory()]": ("parameter_bytes", "gradient_bytes", "optimizer_bytes"),
    "measure it with ls.step_time.measure()": ("forward_seconds", "backward_seconds", "rest_seconds"),
    "train with a method that allocates ranks, such as AdaLoRA": ("budget", "importance"),
    'train Full(optimizer_name="adamw") with observe=[ls.observe.second_moments()]': ("moment_sigma", "moment_error"),
    'train Full(optimizer_name="adamw") with observe=[ls.observe.factorings()]': ("factoring_error_svd",),
    "train with Adapprox": ("factor_rank", "factor_share", "factor_error", "direction_cosine"),
    "train LISA": ("active", "draw_probability"),
    "train NeFT": ("selected",),
    "train with observe=[ls.observe.neurons()], or NeFT": ("neuron_cosine",),
    "train with observe=[ls.observe.utilization()]": ("utilisation",),
    "train on a task with a test split": ("test_metric",),
    "train with eval_every=": ("eval_loss", "eval_metric"),
}
_FIXES = {need: way for way, needs in _WAYS.items() for need in needs}


_STORED: dict[str, tuple[str, Callable[[Result], Sized]]] = {
    UPDATES: ("the adapters' factors", lambda run: run.updates()),
    SPECTRA: ("singular values of updates", singular_values),
    FREQUENCIES: ("Fourier coefficients", fourier.updates),
    BASIS: ("coefficients on a basis", fourier.basis),
    HEADS: ("a number of experts", lambda run: {"number"} & {*(run.meta.recipe or {})}),
}


def missing_reason(run: Result, need: str, history: bool = False) -> str:
    """Return what a run lacks for a figure and how to get it; "" if nothing is missing."""
    fix = _FIXES.get(need, "train with a method that records it")
    if need in _STORED:
        what, find = _STORED[need]
        try:
            found = len(find(run)) > 0
        except ValueError:  # the run has no snapshot of its last step
            found = False
        return "" if found else f"{what}: {fix}"
    rows = run.table[run.table["quantity"] == need]
    if rows.empty:
        return f"records of {need}: {fix}"
    if rows["value"].isna().all():
        return f"{need}, which is unknown without the base model"
    if history and rows["step"].nunique() < 2:
        return f"{need} at more than one step: {fix}"
    return ""
