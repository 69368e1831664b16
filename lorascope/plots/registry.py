"""The catalogue of figures: how each is read, when it misleads, and what it needs from a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import pandas as pd

from lorascope.analysis import fourier
from lorascope.analysis.spectra import singular_values
from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.runs.run import Run
from lorascope.schema.deprecation import warn_renamed

UPDATES, SPECTRA, FREQUENCIES, BASIS, HEADS = "updates", "spectra", "frequencies", "basis", "heads"
OF_UPDATES = frozenset({UPDATES, SPECTRA, "update_norm", "learned_norm", "relative_update", "weight_norm", "step_norm"})
"""What a figure needs that is about updates."""
MIXTURES = "mixtures"
"""Key of a chart's ``meta``: label -> the gates at which updates stand that depend on the input."""
_NORMS = "train with observe=[ls.observe.norms()]"
_MOMENTS = 'train Full(optimizer_name="adamw") with observe=[ls.observe.second_moments()]'
_ADAPPROX = "train with Adapprox"
_ALLOCATOR = "train with a method that allots ranks, such as AdaLoRA"
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


@dataclass(frozen=True)
class Figure:
    """An entry of the catalogue.

    Parameters
    ----------
    name : str
        Name of the function in ``lorascope.plots``.
    draw : callable
        ``draw(runs, control=None, ...)``.
    needs : tuple of str
        Quantities that must be recorded; ``"updates"`` stands for the adapters' factors, ``"spectra"`` for the
        singular values of updates, ``"frequencies"`` for Fourier coefficients, ``"basis"`` for those on any basis,
        ``"heads"`` for HydraLoRA's.
    history : bool
        Must they be recorded at more than one step?
    runs : int
        How many runs it takes at least.
    reads, misleads : str
        How to read it, and when it misleads.
    """

    name: str
    draw: Callable[..., Any]
    needs: tuple[str, ...]
    history: bool
    runs: int
    reads: str
    misleads: str


# Figures that were renamed, by their old names.
OLD_FIGURES = {
    "factorings": "factorization_methods",
    "left_out": "ablations",
    "number_of_heads": "number_of_experts",
    "quality": "accuracy_by_parameters",
}


class _Catalogue(dict[str, Figure]):
    """Figures by name; an old name finds the figure as well, with a warning."""

    def __missing__(self, name: str) -> Figure:
        if name not in OLD_FIGURES:
            raise KeyError(name)
        warn_renamed("FIGURES", name, OLD_FIGURES[name])
        return self[OLD_FIGURES[name]]


FIGURES: dict[str, Figure] = _Catalogue()


def figure(
    *, needs: tuple[str, ...], reads: str, misleads: str, history: bool = False, runs: int = 1
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the catalogue under its own name, and let it say at which gates it shows mixtures."""

    def enter(draw: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(draw)
        def drawn(*args: Any, **kwargs: Any) -> Drawable:
            return _name_gates(draw(*args, **kwargs))

        FIGURES[draw.__name__] = Figure(draw.__name__, drawn, needs, history, runs, reads, misleads)
        return drawn

    return enter


def _name_gates(drawn: Drawable) -> Drawable:
    """Every caption with the gates at which updates are shown that depend on the input: no figure says it itself."""
    mixtures: dict[str, str] = {}
    for row in drawn.rows():
        for chart in row:
            mixtures |= chart.meta.get(MIXTURES, {})
    if not mixtures:
        return drawn
    told = mixture_sentences(mixtures)
    rows = [[replace(chart, caption=" ".join([chart.caption, *told])) for chart in row] for row in drawn.rows()]
    return rows[0][0] if isinstance(drawn, Chart) else Panels(tuple(map(tuple, rows)))


def mixture_sentences(mixtures: Mapping[str, str]) -> list[str]:
    """Sentences on mixtures, given as label -> the gates at which they are shown."""
    labels = {gates: [label for label in mixtures if mixtures[label] == gates] for gates in mixtures.values()}
    return [f"Updates of {', '.join(names)} at {gates}." for gates, names in labels.items()]


def available(run: Run) -> pd.DataFrame:
    """What can be drawn from a run, and what the rest is waiting for.

    Returns
    -------
    DataFrame
        ``figure, runs, drawable, missing``: how many runs the figure takes, whether this can be one of them, and if
        not, which records it lacks and who makes them.
    """
    rows = []
    for name, entry in FIGURES.items():
        lacking = [missing_reason(run, need, entry.history) for need in entry.needs]
        missing = "; ".join(filter(None, lacking))
        rows.append({"figure": name, "runs": entry.runs, "drawable": not missing, "missing": missing})
    return pd.DataFrame(rows)


def missing_reason(run: Run, need: str, history: bool = False) -> str:
    """What a run lacks for a figure, with its remedy; "" if nothing."""
    remedy = RECORDERS.get(need, "train with a method that records it")
    if need in _KEPT:
        what, find = _KEPT[need]
        return "" if _has_any(run, find) else f"{what}: {remedy}"
    rows = run.table[run.table["quantity"] == need]
    if rows.empty:
        return f"records of {need}: {remedy}"
    if rows["value"].isna().all():
        return f"{need}, which is unknown without the base model"
    if history and rows["step"].nunique() < 2:
        return f"{need} at more than one step: {remedy}"
    return ""


def _heads(run: Run) -> Mapping[str, int]:
    recipe = run.meta.get("recipe") or {}
    return {"number": recipe["number"]} if recipe.get("name") == "hydralora" else {}


_KEPT: dict[str, tuple[str, Callable[[Run], Mapping[str, Any]]]] = {
    UPDATES: ("the adapters' factors", Run.updates),
    SPECTRA: ("singular values of updates", singular_values),
    FREQUENCIES: ("Fourier coefficients", fourier.updates),
    BASIS: ("coefficients on a basis", fourier.basis),
    HEADS: ("a number of heads", _heads),
}


def _has_any(run: Run, find: Callable[[Run], Mapping[str, Any]]) -> bool:
    try:
        return len(find(run)) > 0
    except ValueError:  # nothing was kept at its last step
        return False
