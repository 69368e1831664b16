"""Figures of FourierFT's ablations: test metric by the band that its entries are drawn from, and by its basis."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from lorascope.analysis import fourier as analysis
from lorascope.analysis import norms
from lorascope.analysis.stats import band, t_interval
from lorascope.chart import Axis, Band, Chart, Line, Point, Text
from lorascope.plots.catalogue import BASIS, FREQUENCIES, figure
from lorascope.plots.cohort import INTERVAL, Cohort, Group, Runs, axis_label, gather

_EVEN = "drawn evenly"
_BASES = {"fourier": "Fourier", "random": "random", "orthogonal": "orthogonal"}
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
    _check_alike(cohort, "center", "width")
    drawn = pd.DataFrame([_band(group) for group in cohort.groups])
    if drawn["center"].isna().all():
        raise ValueError("bias_curve got no run whose entries were drawn in a band: train FourierFT with center=")
    rows = _metric(cohort)
    cells = band(rows.merge(drawn, on="recipe"), ["series", "width", "center"]).sort_values(["width", "center"])
    curves = cells.dropna(subset="center")
    highest = max(analysis.corner(update.shape) for update in analysis.updates(cohort.runs[0]).values())
    level = pd.concat(cells[cells["center"].isna()].assign(center=end) for end in (0.0, highest))
    low, high = ("low", "high") if cells["low"].notna().any() else (None, None)
    return Chart(
        pd.concat([curves, level]),
        [
            *([Band("center", "low", "high", "series", data=level)] if low and len(level) else []),
            Line("center", "value", "series"),
            Point("center", "value", "series", low=low, high=high, data=curves),
        ],
        title="Bands of frequencies",
        x=Axis(label="favoured distance from frequency zero", limits=(-_ROOM * highest, highest)),
        y=Axis(label=axis_label("test_metric")),
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
    _check_alike(cohort, "basis")
    names = {group.label: _BASES[analysis.basis(group.runs[0])["basis"]] for group in cohort.groups}
    rows = _metric(cohort)
    rows = rows.assign(basis=rows["recipe"].map(names), what=_SEED)
    cells = band(rows, ["basis"]).assign(what=_MEAN)
    cells = cells.assign(words=cells["value"].map("{:.3f}".format), above=_above(cells))
    low, high = ("low", "high") if cells["low"].notna().any() else (None, None)
    return Chart(
        cells,
        [
            *([Point("basis", "value", "what", data=rows)] if low else []),
            Point("basis", "value", "what", low=low, high=high),
            Text("basis", "above", "words"),
        ],
        title="As many coefficients, other bases",
        x=Axis(label="basis", order=dict.fromkeys(names.values())),
        y=Axis(label=axis_label("test_metric")),
        caption=cohort.caption(
            "All scaled to the norm that an update is expected to have at its start on the Fourier basis.",
            *_differences(cohort, rows, cohort.labels[:1]),
            interval=f"bars: {INTERVAL}",
        ),
        colors=(_MEAN, _SEED),
        meta=cohort.meta,
    )


def _band(group: Group) -> dict[str, Any]:
    """Where the entries of a recipe were drawn."""
    recipe = group.runs[0].meta["recipe"]
    if recipe.get("center") is None:
        return {"recipe": group.label, "series": _EVEN, "center": math.nan, "width": math.nan}
    return {"recipe": group.label, "series": f"width {recipe['width']:g}"} | {k: recipe[k] for k in ("center", "width")}


def _metric(cohort: Cohort) -> pd.DataFrame:
    """The test metric of every run at its end."""
    return cohort.label(norms.last(cohort.table[cohort.table["quantity"] == "test_metric"]))


def _above(cells: pd.DataFrame) -> pd.Series:
    """Where the number of a cell is written."""
    top, bottom = cells["high"].fillna(cells["value"]), cells["low"].fillna(cells["value"])
    return top + 0.06 * (top.max() - bottom.min())


def _check_alike(cohort: Cohort, *free: str) -> None:
    """Refuse runs that differ in more than these fields of the method."""
    cohort.same("model", "task")
    first = cohort.runs[0]
    for run in cohort.runs:
        for part in ("recipe", "settings"):
            one, other = first.meta[part], run.meta[part]
            for key in sorted({*one, *other} - {*free}):
                if one.get(key) != other.get(key):
                    raise ValueError(
                        f"{cohort.name} compares runs that differ in {' and '.join(free)} alone; got {key} "
                        f"{one.get(key)} (run {first.id}) and {other.get(key)} (run {run.id})"
                    )


def _differences(cohort: Cohort, rows: pd.DataFrame, bases: list[str]) -> list[str]:
    """Every recipe less the first of ``bases``, paired by seed, where it has the same seeds."""
    seeds = {run.id: run.meta["seed"] for run in cohort.runs}
    values = rows.assign(seed=rows["run"].astype("str").map(seeds)).set_index("seed")
    told = []
    for label in cohort.labels if bases else ():
        one, base = (values["value"][values["recipe"] == name].sort_index() for name in (label, bases[0]))
        if label not in bases and len(one) > 1 and one.index.equals(base.index):
            mean, low, high, _ = t_interval((one - base).to_numpy())
            told.append(f"{label} {mean:.3f} [{low:.3f}, {high:.3f}]")
    return [f"Less {bases[0]}, paired by seed: {'; '.join(told)}."] if told else []
