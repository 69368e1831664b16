"""Figures of ablations: test metric by one setting of a method, and without one of its components.

The differences from one recipe, paired by seed, are in a second panel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope.analysis import fourier as analysis
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, set_side_by_side
from lorascope.charts.marks import Axis, Band, Line, Mark, Rule
from lorascope.plots.builders import dots, ends, metric_dots, paired_differences, ticks_at
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.requirements import BASIS, FREQUENCIES, HEADS
from lorascope.plots.run_groups import INTERVAL, Cohort, Runs

_UNIFORM = "uniform draw"
_BASES = {"fourier": "Fourier", "random": "random", "orthogonal": "orthogonal"}
_HYDRA = "HydraLoRA"
_MARGIN = 0.04  # room for dots at frequency zero and at the highest one


@figure(
    topic="updates",
    needs=(FREQUENCIES, "test_metric"),
    runs=2,
    reads="Each point is the test metric when entries are drawn around that distance from frequency zero; the "
    "horizontal line is the uniform draw. A band helps where its seed-paired difference, on the right, excludes zero.",
    misleads="The best of several bands beats the line by chance: choose the band on some seeds and evaluate it on "
    "others. A high frequency is not a fine detail, because rows and columns of a weight have no order.",
)
def bias_curve(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot an ablation of the frequency bias: test metric against the center of the band (FourierFT, Fig. 5).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of FourierFT that differ only in their band; runs without a band form the horizontal line.

    Raises
    ------
    ValueError
        No run has a band, or the runs differ in other settings.

    Examples
    --------
    ``uniform_draw`` and ``bands`` are runs of ``ls.FourierFT``, ``bands`` with ``center`` and ``width``.

    >>> ls.plots.bias_curve({"uniform": uniform_draw, **bands})
    """
    cohort = gather_runs("bias_curve", runs, control)
    updates = analysis.fourier_updates(cohort.runs[0])
    highest = max(analysis.corner_radius(update.shape) for update in updates.values())
    return cohort.complete(metric_by_band(cohort, highest))


def metric_by_band(cohort: Cohort, highest: float) -> Drawable:
    """Plot an ablation of a cohort's frequency band: test metric against its center, up to the highest frequency."""
    cohort.require_differ_only_in("center", "width")
    uniform, bands = [], []
    for group in cohort.groups:
        recipe = group.runs[0].meta.recipe
        settings = {"recipe": group.label, "series": _UNIFORM, "width": math.nan, "center": math.nan}
        if recipe.get("center") is None:
            uniform.append(group.label)
        else:
            width = recipe["width"]
            settings |= {"series": f"width {width:g}", "width": width, "center": recipe["center"]}
        bands.append(settings)
    if len(uniform) == len(bands):
        raise ValueError("bias_curve needs a run with a frequency band, got none: train FourierFT with center=")
    series = cohort.scores().merge(pd.DataFrame(bands), on="recipe")
    cells = seed_cells(series, ["recipe", "series", "width", "center"]).sort_values(["width", "center"])
    curves = cells.dropna(subset="center")
    return _curve_and_level(
        cohort,
        "center",
        curves,
        # A level needs two points: the ends of the axis.
        pd.concat(cells[cells["center"].isna()].assign(center=end) for end in (0.0, highest)),
        Axis(label="band center", limits=(-_MARGIN * highest, (1 + _MARGIN) * highest)),
        (uniform or cohort.labels)[0],
        f"Entries are drawn around the band center, a distance from frequency zero (Eq. 5) of at most {highest:.0f}.",
        colors=[*dict.fromkeys(curves["series"]), _UNIFORM],
    )


@figure(
    topic="updates",
    needs=(BASIS, "test_metric"),
    runs=2,
    reads="Each dot is the mean test metric on one basis; all bases have the same number of coefficients. The basis "
    "matters where the seed-paired difference, on the right, excludes zero.",
    misleads="All bases share the learning rate and alpha, which may suit some better: tune them per basis. Equal "
    "results mean that the number of coefficients matters, not that any basis would work.",
)
def basis_ablation(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot an ablation of the basis: test metric by the basis of the coefficients (FourierFT, Table 6).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of FourierFT that differ only in their basis; the others are compared with the first.

    Raises
    ------
    ValueError
        The runs differ in more than their basis.

    Examples
    --------
    ``uniform_draw`` and ``bases`` are runs of ``ls.FourierFT``, ``bases`` with ``basis``.

    >>> ls.plots.basis_ablation({"Fourier": uniform_draw, **bases})
    """
    cohort = gather_runs("basis_ablation", runs, control)
    cohort.require_differ_only_in("basis")
    groups = []
    for group in cohort.groups:
        groups.append(replace(group, label=_BASES[analysis.basis_setting(group.runs[0])["basis"]]))
    sentence = "All bases are scaled to the expected norm of the initial update on the Fourier basis."
    return cohort.complete(metric_dots(replace(cohort, groups=tuple(groups)), sentence))


@figure(
    topic="routers",
    needs=(HEADS, "test_metric"),
    runs=2,
    reads="Each point is the test metric with that many experts; overlapping bars mean that the seeds do not "
    "distinguish the numbers. A flat line means that the number matters little; seed-paired differences are on the "
    "right.",
    misleads="Each expert adds parameters (see the caption), so a rise may come from size: add a LoRA of equal size as "
    "control. The best of several numbers also wins by chance.",
)
def number_of_experts(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot an ablation of the number of experts: test metric against this number (HydraLoRA, Fig. 8).

    Parameters
    ----------
    runs : Run, sequence of Run, or mapping label -> run or runs
        Runs of HydraLoRA that differ only in ``num_experts``; the others are compared with the first.
    control : as ``runs``, optional
        Runs of any method on the same task, one horizontal line per label.

    Raises
    ------
    ValueError
        The runs have no experts or differ in more than their number, or the controls have another task or model.

    Examples
    --------
    ``experts`` are runs of ``ls.HydraLoRA(num_experts=...)`` by label, ``equal_lora`` those of an ``ls.LoRA``.

    >>> ls.plots.number_of_experts(experts, control=equal_lora)
    """
    cohort = gather_runs("number_of_experts", runs, control, check=False)
    cohort.without_controls().require(HEADS)
    cohort.require("test_metric")
    return cohort.complete(metric_by_experts(cohort))


def metric_by_experts(cohort: Cohort) -> Drawable:
    """Plot an ablation of a cohort's number of experts: test metric against this number."""
    hydras = cohort.without_controls()
    hydras.require_differ_only_in("num_experts")
    cohort.require_same("model", "task")
    numbers = {group.label: group.runs[0].meta.recipe["num_experts"] for group in hydras.groups}
    cells = seed_cells(cohort.scores(), ["recipe", "kind"])
    curve = cells[cells["kind"] == "run"]
    curve = curve.assign(number=curve["recipe"].map(numbers), series=_HYDRA).sort_values("number")
    # A single side if all runs have the same number, because one point must not be drawn twice.
    sides = sorted({min(numbers.values()), max(numbers.values())})
    controls = cells[cells["kind"] == "control"]
    return _curve_and_level(
        cohort,
        "number",
        curve,
        pd.concat(controls.assign(number=end, series=controls["recipe"]) for end in sides),
        Axis(label="experts", ticks=ticks_at(numbers.values())),
        hydras.labels[0],
        _parameter_counts(cohort),
        colors=[_HYDRA, *dict.fromkeys(controls["recipe"])],
    )


@figure(
    topic="routers",
    needs=("test_metric",),
    runs=2,
    reads="Each dot is the mean test metric of one variant, the best one on top. A component helps where removing it "
    "lowers the metric: its seed-paired difference from the full method, on the right, is below zero.",
    misleads="Removing a component also changes the number of trained parameters (see the caption) and the best "
    "learning rate. Components that replace each other all look useless one at a time: remove them together.",
)
def ablations(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot test metric of a method and its component ablations, one row per label (HydraLoRA, Fig. 6).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs on one task; the first label is the full method, with which the others are compared.

    Raises
    ------
    ValueError
        The runs have different tasks or models.

    Examples
    --------
    ``ablated`` are runs of ``ls.HydraLoRA`` by label, the first with all components.

    >>> ls.plots.ablations(ablated)
    """
    cohort = gather_runs("ablations", runs, control)
    cohort.require_same("model", "task")
    return cohort.complete(metric_dots(cohort, _parameter_counts(cohort)))


def _curve_and_level(
    cohort: Cohort,
    along: str,
    curve: pd.DataFrame,
    level: pd.DataFrame,
    x: Axis,
    base: str,
    *sentences: str,
    colors: Sequence[str],
) -> Drawable:
    """Plot the test metric over a setting, with lines across for recipes without it, and differences from ``base``."""
    cells = pd.concat([curve, level])
    caption = cohort.caption(*filter(None, sentences), interval=f"bars and bands: {INTERVAL}")
    settings: dict[str, Any] = {"x": x, "caption": caption, "colors": colors}
    marks: list[Mark] = [Line(along, "value", "series"), *dots(cells, along, color="series", data=curve)]
    if ends(level):
        marks.insert(0, Band(along, "low", "high", "series", data=level))
    else:
        marks += dots(level, along, color="series", data=level)
    metric = Chart(cells, marks, title=cohort.metric_title(), y=Axis(label=cohort.metric), **settings)
    differences = paired_differences(cohort, cohort.scores(), base)
    differences = differences.merge(curve[["recipe", along, "series"]], on="recipe").sort_values(["series", along])
    if differences.empty:
        return metric
    marks = [Rule(y=0), Line(along, "value", "series"), *dots(differences, along, color="series")]
    y = Axis(label=f"{cohort.metric} − {base}")
    paired = Chart(differences, marks, title="Difference, paired by seed", y=y, **settings)
    return set_side_by_side(replace(metric, title="Recipes"), paired, title=metric.title)


def _parameter_counts(cohort: Cohort) -> str:
    """Return the trained parameters of every recipe, including the classifier head, as a sentence."""
    counts = (f"{group.label}: {group.runs[0].meta.parameters.trained:,}" for group in cohort.groups)
    return f"Trained parameters: {'; '.join(counts)}."
