"""Figures of ablations: test metric by one setting of a method, and without one of its components."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lorascope.analysis import fourier as analysis
from lorascope.analysis.seed_intervals import band, t_interval
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Band, Line, Mark, Point, Text
from lorascope.plots.builders import ends, metric_bars, ticks_at
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.requirements import BASIS, FREQUENCIES, HEADS
from lorascope.plots.run_groups import INTERVAL, Cohort, Runs

_UNIFORM = "uniform draw"
_BASES = {"fourier": "Fourier", "random": "random", "orthogonal": "orthogonal"}
_HYDRA = "HydraLoRA"
_MEAN, _SEED = "mean", "one seed"
_LEFT_MARGIN = 0.04  # margin left of frequency zero, where a point may be drawn


@figure(
    topic="updates",
    needs=(FREQUENCIES, "test_metric"),
    runs=2,
    reads="Each point is the test metric when entries are drawn around that distance from frequency zero; the "
    "horizontal line is the uniform draw. A band helps where its seed-paired difference in the caption excludes zero.",
    misleads="The best of several bands beats the line by chance: choose the band on some seeds and evaluate it on "
    "others. A high frequency is not a fine detail, because rows and columns of a weight have no order.",
)
def bias_curve(runs: Runs, control: Runs | None = None) -> Chart:
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
    ``fourierft`` and ``bands`` are runs of ``ls.FourierFT``, ``bands`` with ``center`` and ``width``.

    >>> ls.plots.bias_curve({"uniform": fourierft, **bands})
    """
    cohort = gather_runs("bias_curve", runs, control)
    updates = analysis.fourier_updates(cohort.runs[0])
    highest = max(analysis.corner_radius(update.shape) for update in updates.values())
    return cohort.complete(metric_by_band(cohort, highest))


def metric_by_band(cohort: Cohort, highest: float) -> Chart:
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
    rows = cohort.scores()
    series = rows.merge(pd.DataFrame(bands), on="recipe")
    cells = band(series, ["series", "width", "center"]).sort_values(["width", "center"])
    curves = cells.dropna(subset="center")
    return _curve_and_level(
        cohort,
        "center",
        curves,
        # A level needs two points: the ends of the axis.
        pd.concat(cells[cells["center"].isna()].assign(center=end) for end in (0.0, highest)),
        Axis(label="band center (distance from zero)", limits=(-_LEFT_MARGIN * highest, highest)),
        "Test metric by frequency band",
        "Entries are drawn around one distance from frequency zero (Eq. 5); the axis ends at the highest.",
        *_differences(cohort, rows, uniform),
        colors=[*dict.fromkeys(curves["series"]), _UNIFORM],
    )


@figure(
    topic="updates",
    needs=(BASIS, "test_metric"),
    runs=2,
    reads="Each dot with a bar is the mean test metric on one basis, surrounded by its seeds; all bases have the same "
    "number of coefficients. The basis matters where the seed-paired difference in the caption excludes zero.",
    misleads="All bases share the learning rate and alpha, which may suit some better: tune them per basis. Equal "
    "results mean that the number of coefficients matters, not that any basis would work.",
)
def basis_ablation(runs: Runs, control: Runs | None = None) -> Chart:
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
    ``fourierft`` and ``bases`` are runs of ``ls.FourierFT``, ``bases`` with ``basis``.

    >>> ls.plots.basis_ablation({"Fourier": fourierft, **bases})
    """
    cohort = gather_runs("basis_ablation", runs, control)
    cohort.require_differ_only_in("basis")
    names = {group.label: _BASES[analysis.basis_setting(group.runs[0])["basis"]] for group in cohort.groups}
    rows = cohort.scores()
    rows = rows.assign(basis=rows["recipe"].map(names), what=_SEED)
    cells = band(rows, ["basis"]).assign(what=_MEAN)
    top, bottom = cells["high"].fillna(cells["value"]), cells["low"].fillna(cells["value"])
    above = top + 0.06 * (top.max() - bottom.min())  # room for half the height of a number
    cells = cells.assign(words=cells["value"].map("{:.3f}".format), above=above)
    marks: list[Mark] = [Point("basis", "value", "what", **ends(cells)), Text("basis", "above", "words")]
    if ends(cells):  # several seeds, below their mean
        marks.insert(0, Point("basis", "value", "what", data=rows))
    return cohort.complete(
        Chart(
            cells,
            marks,
            title="Test metric by basis",
            x=Axis(label="basis", order=dict.fromkeys(names.values())),
            y=Axis(label=cohort.metric),
            caption=cohort.caption(
                "All bases are scaled to the expected norm of the initial update on the Fourier basis.",
                *_differences(cohort, rows, cohort.labels[:1]),
                interval=f"bars: {INTERVAL}",
            ),
            colors=(_MEAN, _SEED),
        )
    )


@figure(
    topic="routers",
    needs=(HEADS, "test_metric"),
    runs=2,
    reads="Each point is the test metric with that many experts; overlapping bars mean that the seeds do not "
    "distinguish the numbers. A flat line means that the number matters little; the caption has seed-paired "
    "differences.",
    misleads="Each expert adds parameters (see the caption), so a rise may come from size: add a LoRA of equal size as "
    "control. The best of several numbers also wins by chance.",
)
def number_of_experts(runs: Runs, control: Runs | None = None) -> Chart:
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
    ``one_expert`` and ``hydralora`` are runs of ``ls.HydraLoRA(num_experts=...)``.

    >>> ls.plots.number_of_experts({"one expert": one_expert, "four experts": hydralora})
    """
    cohort = gather_runs("number_of_experts", runs, control, check=False)
    cohort.without_controls().require(HEADS)
    cohort.require("test_metric")
    return cohort.complete(metric_by_experts(cohort))


def metric_by_experts(cohort: Cohort) -> Chart:
    """Plot an ablation of a cohort's number of experts: test metric against this number."""
    hydras = cohort.without_controls()
    hydras.require_differ_only_in("num_experts")
    cohort.require_same("model", "task")
    numbers = {group.label: group.runs[0].meta.recipe["num_experts"] for group in hydras.groups}
    rows = cohort.scores()
    cells = band(rows, ["recipe", "kind"])
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
        "Test metric by number of experts",
        _parameter_counts(cohort),
        *_differences(hydras, rows, hydras.labels[:1]),
        colors=[_HYDRA, *dict.fromkeys(controls["recipe"])],
    )


@figure(
    topic="routers",
    needs=("test_metric",),
    runs=2,
    reads="Each bar is the test metric of one variant: the full method first, then the method without one component. A "
    "component helps where removing it lowers the metric: its seed-paired interval in the caption is below zero.",
    misleads="Removing a component also changes the number of trained parameters (see the caption) and the best "
    "learning rate. Components that replace each other all look useless one at a time: remove them together.",
)
def ablations(runs: Runs, control: Runs | None = None, start: float = 0.0) -> Chart:
    """Plot test metric of a method and its component ablations, one bar per label (HydraLoRA, Fig. 6).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs on one task; the first label is the full method, with which the others are compared.
    start : float
        Lower end of the metric axis; above 0, small differences look large.

    Raises
    ------
    ValueError
        The runs have different tasks or models.

    Examples
    --------
    ``hydralora`` and ``uniform_router`` are runs of ``ls.HydraLoRA``, the latter with ``router="uniform"``.

    >>> ls.plots.ablations({"HydraLoRA": hydralora, "uniform router": uniform_router})
    """
    cohort = gather_runs("ablations", runs, control)
    cohort.require_same("model", "task")
    sentences = [_parameter_counts(cohort), *_differences(cohort, cohort.scores(), cohort.labels[:1])]
    return cohort.complete(metric_bars(cohort, start, "", sentences, "Ablations"))


def _curve_and_level(
    cohort: Cohort,
    along: str,
    curve: pd.DataFrame,
    level: pd.DataFrame,
    x: Axis,
    title: str,
    *sentences: str,
    colors: Sequence[str],
) -> Chart:
    """Plot the test metric over a setting, and as horizontal lines the recipes without it."""
    cells = pd.concat([curve, level])
    marks: list[Mark] = [Line(along, "value", "series"), Point(along, "value", "series", **ends(cells), data=curve)]
    if ends(cells) and len(level):
        marks.insert(0, Band(along, "low", "high", "series", data=level))
    return Chart(
        cells,
        marks,
        title=title,
        x=x,
        y=Axis(label=cohort.metric),
        caption=cohort.caption(*sentences, interval=f"bars and band: {INTERVAL}"),
        colors=colors,
    )


def _parameter_counts(cohort: Cohort) -> str:
    """Return the trained parameters of every recipe, including the classifier head, as a sentence."""
    counts = (f"{group.label}: {group.runs[0].meta.parameters.trained:,}" for group in cohort.groups)
    return f"Trained parameters: {'; '.join(counts)}."


def _differences(cohort: Cohort, rows: pd.DataFrame, bases: list[str]) -> list[str]:
    """Describe the difference of every recipe from the first of ``bases``, paired by seed, if they have equal seeds."""
    seeds = {run.id: run.meta.seed for run in cohort.runs}
    values = rows.assign(seed=rows["run"].astype("str").map(seeds)).set_index("seed")
    by_label = {label: values["value"][values["recipe"] == label].sort_index() for label in cohort.labels}
    differences = []
    for label, scores in by_label.items():
        if bases and label not in bases and len(scores) > 1 and scores.index.equals(by_label[bases[0]].index):
            # Pairs of one seed share data order and initialization, so their difference varies less.
            mean, low, high, _ = t_interval((scores - by_label[bases[0]]).to_numpy())
            differences.append(f"{label}: {mean:z.3f} [{low:z.3f}, {high:z.3f}]")
    if not differences:
        return []
    return [f"Difference from {bases[0]}, paired by seed [95% t-interval]: {'; '.join(differences)}."]
