"""Requirements of figures, as data: how each record is found in a run, and how to get it if it is missing."""

from __future__ import annotations

from collections.abc import Callable, Sized
from contextlib import suppress

from lorascope.analysis import fourier
from lorascope.analysis.spectra import singular_values
from lorascope.analysis.turning_points import FEWEST_CHECKPOINTS
from lorascope.runs.result import Result
from lorascope.schema.plugins import load_plugins
from lorascope.schema.records import QUANTITIES

UPDATES, SPECTRA, FREQUENCIES, BASIS, HEADS = "updates", "spectra", "frequencies", "basis", "heads"
STEPS, MANY_STEPS = "updates at several steps", "updates at many steps"
OF_UPDATES = frozenset(
    {UPDATES, SPECTRA, STEPS, MANY_STEPS, "update_norm", "learned_norm", "relative_update", "weight_norm", "step_norm"}
)
"""Needs of figures that show updates."""

_RECORDERS = ("lorascope.methods", "lorascope.observe", "lorascope.experiments")  # packages that register quantities
# Other needs than quantities: a description, how to get them, and how to find them in a run.
_STORED: dict[str, tuple[str, str, Callable[[Result], Sized]]] = {
    UPDATES: (
        "the adapters' factors",
        "train with a method that has factors, such as LoRA",
        lambda run: run.updates(),
    ),
    SPECTRA: ("singular values of updates", "train with observe=[ls.observe.norms()]", singular_values),
    STEPS: (
        "the adapters' factors at more than one step",
        "train with observe=[ls.observe.factors()], or load a folder of checkpoints",
        lambda run: run.update_steps()[1:],
    ),
    MANY_STEPS: (
        f"the adapters' factors at {FEWEST_CHECKPOINTS} steps or more",
        "train with observe=[ls.observe.factors(every=10)], or load a folder of checkpoints",
        lambda run: run.update_steps()[FEWEST_CHECKPOINTS - 1 :],
    ),
    FREQUENCIES: ("Fourier coefficients", "train with FourierFT", fourier.fourier_updates),
    BASIS: ("coefficients on a basis", "train with FourierFT", fourier.basis_setting),
    HEADS: ("a number of experts", "train HydraLoRA", lambda run: {"num_experts"} & {*run.meta.recipe}),
}


def _recorded_by(quantity: str) -> str:
    """Return how to get a quantity recorded, after importing the methods and observers if that is still unknown."""
    if not getattr(QUANTITIES.get(quantity), "recorded_by", ""):
        with suppress(ModuleNotFoundError):  # without torch, only the quantities of the schema are known
            for package in _RECORDERS:
                load_plugins(package)
    return getattr(QUANTITIES.get(quantity), "recorded_by", "") or "train with a method that records it"


def missing_reason(run: Result, need: str, history: bool = False) -> str:
    """Return which requirement of a figure is missing in a run, and how to get it; "" if none is missing."""
    if need in _STORED:
        description, fix, find = _STORED[need]
        with suppress(ValueError):  # the run has no snapshot of its last step
            if len(find(run)):
                return ""
        return f"{description}: {fix}"
    rows = run.table[run.table["quantity"] == need]
    if rows.empty:
        return f"records of {need}: {_recorded_by(need)}"
    if rows["value"].isna().all():
        return f"{need}, which is unknown without the base model"
    if history and rows["step"].nunique() < 2:
        return f"{need} at more than one step: {_recorded_by(need)}"
    return ""
