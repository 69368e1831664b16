"""Figures of ablations: test metric by one choice of a method, and by what is left out of it."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from lorascope.analysis import fourier as analysis
from lorascope.analysis.seed_intervals import band, t_interval
from lorascope.charts.chart import Axis, Band, Chart, Line, Point, Text
from lorascope.plots.registry import BASIS, FREQUENCIES, HEADS, figure
from lorascope.plots.run_groups import INTERVAL, Cohort, Group, Runs, bars, ends, gather

_EVEN = "drawn evenly"
_BASES = {"fourier": "Fourier", "random": "random", "orthogonal": "orthogonal"}
_HYDRA = "HydraLoRA"
_MEAN, _SEED = "mean", "one seed"
_ROOM = 0.04  # left of frequency zero, where a point may lie


@figure(
    needs=(FREQUENCIES, "test_metric"),
    runs=2,
    reads="A point is what training reaches when the entries are drawn around this distance from frequency zero; the "
    "level line is what it reaches when they are drawn from all alike. A band is worth choosing where the difference "
    "in the caption, which pairs the seeds, keeps clear of zero.",
    misleads="The best of several bands lies above the line by chance alone: choose it on some seeds and look at it on "
    "others. What is far from zero is not fine in any sense, since rows and columns of a weight have no order.",
)
def bias_curve(runs: Runs, control: Runs | None = None) -> Chart:
    """Test metric against the favoured frequency of the band that entries are drawn from (FourierFT, Fig. 5).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of FourierFT that differ in their band alone; those without one are the level line.

    Raises
    ------
    ValueError
        No run has a band, or they differ in more.
    """
    cohort = gather("bias_curve", runs, control)
    cohort.require(FREQUENCIES, "test_metric")
    cohort.require_differ_only_in("center", "width")
    drawn = pd.DataFrame([_band_label(group) for group in cohort.groups])
    if drawn["center"].isna().all():
        raise ValueError("bias_curve got no run whose entries were drawn in a band: train FourierFT with center=")
    rows = cohort.scores()
    cells = band(rows.merge(drawn, on="recipe"), ["series", "width", "center"]).sort_values(["width", "center"])
    curves = cells.dropna(subset="center")
    highest = max(analysis.corner(update.shape) for update in analysis.updates(cohort.runs[0]).values())
    level = pd.concat(cells[cells["center"].isna()].assign(center=end) for end in (0.0, highest))
    low, high = ends(cells)
    return Chart(
        pd.concat([curves, level]),
        [
            *([Band("center", "low", "high", "series", data=level)] if low and len(level) else []),
            Line("center", "value", "series"),
            Point("center", "value", "series", low=low, high=high, data=curves),
        ],
        title="Bands of frequencies",
        x=Axis(label="favoured distance from frequency zero", limits=(-_ROOM * highest, highest)),
        y=Axis(label=cohort.metric),
        caption=cohort.caption(
            "Entries drawn around one distance from frequency zero, as Eq. 5 has it; the axis ends at the highest.",
            *_differences(cohort, rows, drawn["recipe"][drawn["center"].isna()].tolist()),
            interval=f"bars and band: {INTERVAL}",
        ),
        colors=[*dict.fromkeys(curves["series"]), _EVEN],
        meta=cohort.meta,
    )


@figure(
    needs=(BASIS, "test_metric"),
    runs=2,
    reads="The dot with a bar is what coefficients on this basis reach, the mean of the seeds that lie around it. The "
    "frequencies matter if another basis of as many coefficients stays below: the caption has the differences, paired "
    "by seed.",
    misleads="Bases compare only at equal size of the update at the start, as they are scaled here; one rate and one "
    "alpha for all of them may still suit some better. Two bases that are level say that the number of coefficients "
    "counts, not that any basis would do.",
)
def basis_ablation(runs: Runs, control: Runs | None = None) -> Chart:
    """Test metric by the basis on which the coefficients stand (FourierFT, Table 6).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of FourierFT that differ in their basis alone; the first is what the others are compared with.

    Raises
    ------
    ValueError
        They differ in more than their basis.
    """
    cohort = gather("basis_ablation", runs, control)
    cohort.require(BASIS, "test_metric")
    cohort.require_differ_only_in("basis")
    names = {group.label: _BASES[analysis.basis(group.runs[0])["basis"]] for group in cohort.groups}
    rows = cohort.scores()
    rows = rows.assign(basis=rows["recipe"].map(names), what=_SEED)
    cells = band(rows, ["basis"]).assign(what=_MEAN)
    cells = cells.assign(words=cells["value"].map("{:.3f}".format), above=_label_heights(cells))
    low, high = ends(cells)
    return Chart(
        cells,
        [
            *([Point("basis", "value", "what", data=rows)] if low else []),
            Point("basis", "value", "what", low=low, high=high),
            Text("basis", "above", "words"),
        ],
        title="As many coefficients, other bases",
        x=Axis(label="basis", order=dict.fromkeys(names.values())),
        y=Axis(label=cohort.metric),
        caption=cohort.caption(
            "All scaled to the norm that an update is expected to have at its start on the Fourier basis.",
            *_differences(cohort, rows, cohort.labels[:1]),
            interval=f"bars: {INTERVAL}",
        ),
        colors=(_MEAN, _SEED),
        meta=cohort.meta,
    )


@figure(
    needs=(HEADS, "test_metric"),
    runs=2,
    reads="A point is what this many heads reach. Numbers that the seeds cannot tell apart have overlapping bars; a "
    "flat line says that the number need not be chosen with care; the differences in the caption pair the seeds.",
    misleads="Every further head costs parameters, which the caption counts: a rise may be theirs, and a level line, "
    "such as a LoRA of as many parameters given as control, says what they buy elsewhere. The best of several numbers "
    "is the best by chance, too.",
)
def number_of_experts(runs: Runs, control: Runs | None = None) -> Chart:
    """Test metric against the number of heads (HydraLoRA, Fig. 8).

    Parameters
    ----------
    runs : Run, sequence of Run, or mapping label -> run or runs
        Runs of HydraLoRA that differ in ``num_experts`` alone; the first is what the others are compared with.
    control : as ``runs``, optional
        Of any method on the same task: a level line each.

    Raises
    ------
    ValueError
        The runs have no heads or differ in more than their number, or the controls are of another task or model.
    """
    own, cohort = gather("number_of_experts", runs), gather("number_of_experts", runs, control)
    own.require(HEADS)
    cohort.require("test_metric")
    own.require_differ_only_in("number")
    cohort.require_same("model", "task")
    numbers = {group.label: group.runs[0].meta["recipe"]["number"] for group in own.groups}
    sides = sorted({min(numbers.values()), max(numbers.values())})
    rows = cohort.scores()
    cells = band(rows, ["recipe", "kind"])
    curve = cells[cells["kind"] == "run"]
    curve = curve.assign(number=curve["recipe"].map(numbers), series=_HYDRA).sort_values("number")
    levels = [cells[cells["kind"] == "control"].assign(number=end, series=lambda part: part["recipe"]) for end in sides]
    level = pd.concat(levels)
    low, high = ends(cells)
    return Chart(
        pd.concat([curve, level]),
        [
            *([Band("number", "low", "high", "series", data=level)] if low and len(level) else []),
            Line("number", "value", "series"),
            Point("number", "value", "series", low=low, high=high, data=curve),
        ],
        title="What heads buy",
        x=Axis(label="heads", ticks={number: str(number) for number in sorted(numbers.values())}),
        y=Axis(label=cohort.metric),
        caption=cohort.caption(
            f"Trained parameters: {_parameter_counts(cohort)}.",
            *_differences(own, rows, own.labels[:1]),
            interval=f"bars and band: {INTERVAL}",
        ),
        colors=[_HYDRA, *dict.fromkeys(level["series"])],
        meta=cohort.meta,
    )


@figure(
    needs=("test_metric",),
    runs=2,
    reads="A bar is what one form of a method reaches on the test split: the first the whole, the others with a part "
    "left out. A part is of use where the difference in the caption, which pairs the seeds, lies below zero with its "
    "whole interval.",
    misleads="Leaving a part out also changes how many parameters train, which the caption counts, and which learning "
    "rate would suit. Parts that stand in for each other all look useless one at a time.",
)
def ablations(runs: Runs, control: Runs | None = None, start: float = 0.0) -> Chart:
    """Test metric of a method and of what is left of it without a part, one bar a label (HydraLoRA, Fig. 6).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs on one task; the first is the whole, which the others are compared with.
    start : float
        Lower end of the axis; bars that do not start at 0 make small differences look large.

    Raises
    ------
    ValueError
        The runs are of different tasks or models.
    """
    cohort = gather("ablations", runs, control)
    cohort.require("test_metric")
    cohort.require_same("model", "task")
    rows = cohort.scores()
    cells, marks = bars(band(rows, ["recipe", "kind"]), start)
    return Chart(
        cells,
        marks,
        title="What is left out",
        x=Axis(order=cohort.labels),
        y=Axis(label=cohort.metric, limits=(start, None)),
        caption=cohort.caption(
            f"Trained parameters: {_parameter_counts(cohort)}.",
            *_differences(cohort, rows, cohort.labels[:1]),
            interval=f"bars: {INTERVAL}",
        ),
        meta=cohort.meta,
    )


def _parameter_counts(cohort: Cohort) -> str:
    """Trained parameters of every recipe, the head's among them."""
    return "; ".join(f"{group.label} {group.runs[0].meta['parameters']['trained']:,}" for group in cohort.groups)


def _band_label(group: Group) -> dict[str, Any]:
    """Where the entries of a recipe were drawn."""
    recipe = group.runs[0].meta["recipe"]
    if recipe.get("center") is None:
        return {"recipe": group.label, "series": _EVEN, "center": math.nan, "width": math.nan}
    return {"recipe": group.label, "series": f"width {recipe['width']:g}"} | {k: recipe[k] for k in ("center", "width")}


def _label_heights(cells: pd.DataFrame) -> pd.Series:
    """Where the number of a cell is written."""
    top, bottom = cells["high"].fillna(cells["value"]), cells["low"].fillna(cells["value"])
    return top + 0.06 * (top.max() - bottom.min())


def _differences(cohort: Cohort, rows: pd.DataFrame, bases: list[str]) -> list[str]:
    """Every recipe less the first of ``bases``, paired by seed, where it has the same seeds."""
    seeds = {run.id: run.meta["seed"] for run in cohort.runs}
    values = rows.assign(seed=rows["run"].astype("str").map(seeds)).set_index("seed")
    told = []
    for label in cohort.labels if bases else ():
        one, base = (values["value"][values["recipe"] == name].sort_index() for name in (label, bases[0]))
        if label not in bases and len(one) > 1 and one.index.equals(base.index):
            mean, low, high, _ = t_interval((one - base).to_numpy())
            told.append(f"{label}: {mean:.3f} [{low:.3f}, {high:.3f}]")
    return [f"Less {bases[0]}, paired by seed: {'; '.join(told)}."] if told else []
