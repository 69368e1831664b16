"""Registry of figures: how to read each one, its caveat, and the records that it needs from a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal

import pandas as pd

from lorascope.analysis import fourier
from lorascope.analysis.spectra import singular_values
from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.runs.result import Result
from lorascope.schema.deprecation import warn_renamed

UPDATES, SPECTRA, FREQUENCIES, BASIS, HEADS = "updates", "spectra", "frequencies", "basis", "heads"
OF_UPDATES = frozenset({UPDATES, SPECTRA, "update_norm", "learned_norm", "relative_update", "weight_norm", "step_norm"})
"""Needs of figures that show updates."""
MIXTURES = "mixtures"
"""Key of a chart's ``meta``: label -> gate weights at which its input-dependent updates are evaluated."""
_NORMS = "train with observe=[ls.observe.norms()]"
_MOMENTS = 'train Full(optimizer_name="adamw") with observe=[ls.observe.second_moments()]'
_ADAPPROX = "train with Adapprox"
_ALLOCATOR = "train with a method that allocates ranks, such as AdaLoRA"
RECORDERS = {
    UPDATES: "train with a method that has factors, such as LoRA",
    SPECTRA: _NORMS,
    FREQUENCIES: "train with FourierFT",
    BASIS: "train with FourierFT",
    HEADS: "train HydraLoRA",
    "update_norm": _NORMS,
    "learned_norm": _NORMS,
    "weight_norm": _NORMS,
    "relative_update": _NORMS,
    "step_norm": _NORMS,
    "adapter_norm": _NORMS,
    "rank": "train adapters with observe=[ls.observe.norms()]",
    **dict.fromkeys(
        ("parameter_bytes", "gradient_bytes", "optimizer_bytes"), "train with observe=[ls.observe.memory()]"
    ),
    **dict.fromkeys(("forward_seconds", "backward_seconds", "rest_seconds"), "measure it with ls.step_time.measure()"),
    "budget": _ALLOCATOR,
    "importance": _ALLOCATOR,
    "moment_sigma": _MOMENTS,
    "moment_error": _MOMENTS,
    "factoring_error_svd": 'train Full(optimizer_name="adamw") with observe=[ls.observe.factorings()]',
    "factor_rank": _ADAPPROX,
    "factor_share": _ADAPPROX,
    "factor_error": _ADAPPROX,
    "direction_cosine": _ADAPPROX,
    "active": "train LISA",
    "draw_probability": "train LISA",
    "gate_entropy": "train HydraLoRA",
    "gate_information": "train HydraLoRA on a task with groups",
    "selected": "train NeFT",
    "neuron_cosine": "train with observe=[ls.observe.neurons()], or NeFT",
    "utilisation": "train with observe=[ls.observe.utilization()]",
    "test_metric": "train on a task with a test split",
    "eval_loss": "train with eval_every=",
    "eval_metric": "train with eval_every=",
}


Topic = Literal["updates", "ranks", "factors", "routers", "neurons", "schedules", "optimizers"]


@dataclass(frozen=True)
class Figure:
    """Registered figure.

    Parameters
    ----------
    name : str
        Name of the function in ``lorascope.plots``.
    draw : callable
        The function: ``draw(runs, control=None, ...)``.
    topic : str
        Gallery page of the figure: "updates", "ranks", "factors", "routers", "neurons", "schedules" or "optimizers".
    needs : tuple of str
        Quantities that must be recorded. Also possible: ``"updates"`` (adapter factors), ``"spectra"`` (singular
        values of updates), ``"frequencies"`` (Fourier coefficients), ``"basis"`` (coefficients on any basis) and
        ``"heads"`` (HydraLoRA's experts).
    history : bool
        Whether the quantities must be recorded at more than one step.
    runs : int
        Minimum number of runs.
    reads, misleads : str
        How to read the figure, and its caveat; at most two sentences each, as plain text.
    """

    name: str
    draw: Callable[..., Any]
    topic: Topic
    needs: tuple[str, ...]
    history: bool
    runs: int
    reads: str
    misleads: str


# Renamed figures: old name -> new name.
OLD_FIGURES = {
    "factorings": "factorization_methods",
    "left_out": "ablations",
    "number_of_heads": "number_of_experts",
    "quality": "accuracy_by_parameters",
}


class _Figures(dict[str, Figure]):
    """Figures by name; an old name also works, with a warning."""

    def __missing__(self, name: str) -> Figure:
        if name not in OLD_FIGURES:
            raise KeyError(name)
        warn_renamed("FIGURES", name, OLD_FIGURES[name])
        return self[OLD_FIGURES[name]]


FIGURES: dict[str, Figure] = _Figures()


def figure(
    *, topic: Topic, needs: tuple[str, ...], reads: str, misleads: str, history: bool = False, runs: int = 1
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a figure under its own name, and add the gates of input-dependent updates to its captions.

    Parameters
    ----------
    topic, needs, reads, misleads, history, runs
        See `Figure`.
    """

    def register(draw: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(draw)
        def drawn(*args: Any, **kwargs: Any) -> Drawable:
            return _name_gates(draw(*args, **kwargs))

        FIGURES[draw.__name__] = Figure(draw.__name__, drawn, topic, needs, history, runs, reads, misleads)
        return drawn

    return register


def _name_gates(drawn: Drawable) -> Drawable:
    """Add the gates of input-dependent updates to every caption, so that no figure has to do it itself."""
    mixtures: dict[str, str] = {}
    for row in drawn.rows():
        for chart in row:
            mixtures |= chart.meta.get(MIXTURES, {})
    if not mixtures:
        return drawn
    added = mixture_sentences(mixtures)
    rows = [[replace(chart, caption=" ".join([chart.caption, *added])) for chart in row] for row in drawn.rows()]
    return rows[0][0] if isinstance(drawn, Chart) else Panels(tuple(map(tuple, rows)))


def mixture_sentences(mixtures: Mapping[str, str]) -> list[str]:
    """Return sentences such as "Updates of HydraLoRA at mean gates." from a mapping label -> gates."""
    labels = {gates: [label for label in mixtures if mixtures[label] == gates] for gates in mixtures.values()}
    return [f"Updates of {', '.join(names)} at {gates}." for gates, names in labels.items()]


def available(run: Result) -> pd.DataFrame:
    """List the figures, whether the run has their records, and what is missing.

    Returns
    -------
    DataFrame
        ``figure, runs, drawable, missing``: minimum number of runs, whether this run can be one of them, and if not,
        the missing records and how to get them.
    """
    rows = []
    for name, entry in FIGURES.items():
        lacking = [missing_reason(run, need, entry.history) for need in entry.needs]
        missing = "; ".join(filter(None, lacking))
        rows.append({"figure": name, "runs": entry.runs, "drawable": not missing, "missing": missing})
    return pd.DataFrame(rows)


def missing_reason(run: Result, need: str, history: bool = False) -> str:
    """Return what a run lacks for a figure and how to get it; "" if nothing is missing."""
    fix = RECORDERS.get(need, "train with a method that records it")
    if need in _STORED:
        what, find = _STORED[need]
        return "" if _has_any(run, find) else f"{what}: {fix}"
    rows = run.table[run.table["quantity"] == need]
    if rows.empty:
        return f"records of {need}: {fix}"
    if rows["value"].isna().all():
        return f"{need}, which is unknown without the base model"
    if history and rows["step"].nunique() < 2:
        return f"{need} at more than one step: {fix}"
    return ""


def _num_experts(run: Result) -> Mapping[str, int]:
    recipe = run.meta.recipe or {}
    return {"number": recipe["number"]} if recipe.get("name") == "hydralora" else {}


_STORED: dict[str, tuple[str, Callable[[Result], Mapping[str, Any]]]] = {
    UPDATES: ("the adapters' factors", lambda run: run.updates()),
    SPECTRA: ("singular values of updates", singular_values),
    FREQUENCIES: ("Fourier coefficients", fourier.updates),
    BASIS: ("coefficients on a basis", fourier.basis),
    HEADS: ("a number of experts", _num_experts),
}


def _has_any(run: Result, find: Callable[[Result], Mapping[str, Any]]) -> bool:
    try:
        return len(find(run)) > 0
    except ValueError:  # the run has no snapshot of its last step
        return False
