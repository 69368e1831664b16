"""Figures of LISA's draws: what trained when and how often, and what the number of blocks and of draws is worth."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis import lisa_schedule, norms
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import (
    Axis,
    Bar,
    Chart,
    Drawable,
    Heat,
    Line,
    Panels,
    set_side_by_side,
    stack_vertically,
    wrap,
)
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import INTERVAL, Cohort, Runs, axis_label, ends, gather, lines

_EXPECTED = ", expected"


@figure(
    needs=("active", "draw_probability"),
    reads="A cell is bright where a block trained in an interval; of several seeds, the brighter the more of them. "
    "Beside it the number of blocks that were reached so far: below its expectation, the draws left more blocks as "
    "they were than chance does.",
    misleads="What lies outside the blocks (embedding, norm, head) always trains and is not shown, though it may be "
    "most of the parameters. A block drawn often need not have moved far: where the rate falls, the early draws count.",
)
def active_layers(runs: Runs, control: Runs | None = None) -> Panels:
    """Blocks that trained in every interval, beside the number reached; one row of panels a recipe (LISA).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw below it.
    """
    cohort = gather("active_layers", runs, control)
    cohort.require("active", "draw_probability")
    cells = cohort.label(lisa_schedule.intervals(cohort.table))
    reached = cohort.label(lisa_schedule.coverage(cohort.table))
    caption = cohort.caption(
        "Left, the runs in which a block trained, by interval. Right, the blocks trained so far, and what such draws "
        "reach on average: the sum over the blocks of 1 − (1 − chance of a draw)ⁿ after n draws."
    )
    rows = [
        set_side_by_side(_activity_heat(cohort, cells, label, caption), _coverage(cohort, reached, label, caption))
        for label in cohort.labels
    ]
    return stack_vertically(*rows)


@figure(
    needs=("active", "draw_probability"),
    reads="A bar is the share of the draws that took a block, the line the chance of it. Bars around the line are what "
    "lots do; a block that stands off it by more than its interval in many seeds was not drawn by these chances.",
    misleads="Few draws scatter widely, and draws of one interval exclude each other, so that one bar above the line "
    "pulls others below it. How often a block trained does not say how far it moved.",
)
def draw_frequency(runs: Runs, control: Runs | None = None) -> Drawable:
    """How often each block was drawn, beside the chance of it; one panel a recipe (LISA, section 3.2).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    """
    cohort = gather("draw_frequency", runs, control)
    cohort.require("active", "draw_probability")
    found = cohort.label(lisa_schedule.visits(cohort.table).rename(columns={"frequency": "value"}))
    caption = cohort.caption(
        "Share of the draws that took a block; the line is its chance.", interval=f"bars: {INTERVAL}"
    )
    panels = [_frequency_chart(cohort, found, label, caption) for label in cohort.labels]
    return wrap(panels, len(panels))


@figure(
    needs=("active", "draw_probability", "test_metric"),
    runs=2,
    reads="A cell is what training reaches with so many blocks at a time, drawn anew after so many steps; hatched "
    "cells were not trained. Up a column more blocks train at once, along a row the draws get fewer, down to one.",
    misleads="More blocks also cost more memory, so a cell is not better for being brighter. One rate for all is a "
    "choice: the paper lowers it as more blocks train. Cells within the interval of the caption are not to be ranked.",
)
def draw_grid(runs: Runs, control: Runs | None = None) -> Chart:
    """Test metric by blocks at a time and steps between draws (LISA, table 6 and figures 7 to 9).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of LISA on one task that differ in these two alone.

    Raises
    ------
    ValueError
        The runs differ in anything else, or two labels share a cell.
    """
    cohort = gather("draw_grid", runs, control)
    cohort.require("active", "draw_probability", "test_metric")
    cohort.require_differ_only_in("n_active", "interval")
    reached = norms.last(cohort.table[cohort.table["quantity"] == "test_metric"]).astype({"run": "str"})
    rows = cohort.label(reached.merge(lisa_schedule.sizes(cohort.table), on="run"))
    for (blocks, steps), own in rows.groupby(["blocks", "steps"]):
        if own["recipe"].nunique() > 1:
            both = " and ".join(own["recipe"].unique())
            raise ValueError(f"draw_grid got {both}, all {blocks} blocks for {steps} steps: give one of them")
    cells = band(rows, ["blocks", "steps"])
    half: float = ((cells["high"] - cells["low"]) / 2).max()
    widest = "" if pd.isna(half) else f" Widest interval of a cell: ±{half:.3f}."
    sides = {name: [str(size) for size in sorted(set(cells[name]))] for name in ("blocks", "steps")}
    return Chart(
        cells.astype({"blocks": "str", "steps": "str"}),
        [Heat("steps", "blocks", "value", cohort.metric, ".3f")],
        title="Blocks at a time, and steps between draws",
        x=Axis(label="steps between draws", order=sides["steps"]),
        y=Axis(label="blocks at a time", order=sides["blocks"][::-1]),
        caption=cohort.caption(
            f"Test metric after the last step; a run of as many steps as between draws draws once.{widest}",
            interval="95 % t-intervals in the data",
        ),
        meta=cohort.meta,
    )


def _activity_heat(cohort: Cohort, cells: pd.DataFrame, label: str, caption: str) -> Chart:
    """Share of the runs of one recipe in which a block trained in an interval."""
    own = cells[cells["recipe"] == label].astype({"active": "float64"})
    shares = own.groupby(["start", "place"], observed=True)["active"].mean().rename("value").reset_index()
    places = [str(place) for place in shares["place"].cat.categories]
    return Chart(
        shares.astype({"start": "str", "place": "str"}),
        [Heat("start", "place", "value", "share of runs", limits=(0.0, 1.0))],
        title=label,
        x=Axis(label="first step of interval", order=[str(start) for start in sorted(set(own["start"]))]),
        y=Axis(label="block", order=places[::-1]),
        caption=caption,
        meta=cohort.meta,
    )


def _coverage(cohort: Cohort, reached: pd.DataFrame, label: str, caption: str) -> Chart:
    """Blocks of one recipe that have trained so far, beside what such draws reach on average."""
    own = reached[reached["recipe"] == label]
    expected = own.assign(value=own["expected"], recipe=f"{label}{_EXPECTED}")
    cells = band(pd.concat([own, expected]), ["recipe", "kind", "step"])
    return Chart(
        cells,
        lines(cells, "step", points=False),
        x=Axis(label="step"),
        y=Axis(label=axis_label("coverage"), limits=(0, None)),
        caption=caption,
        colors=[label, f"{label}{_EXPECTED}"],
        meta=cohort.meta,
    )


def _frequency_chart(cohort: Cohort, found: pd.DataFrame, label: str, caption: str) -> Chart:
    """Shares of the draws of one recipe, with the chance as a line."""
    own = found[found["recipe"] == label]
    cells = band(own, ["place"]).assign(what="drawn")
    cells["expected"] = own.groupby("place", observed=True)["expected"].mean().reindex(cells["place"]).to_numpy()
    low, high = ends(cells)
    chance = cells.assign(what="chance")
    return Chart(
        cells,
        [Bar("place", "value", "what", low=low, high=high), Line("place", "expected", "what", data=chance)],
        title=label,
        x=Axis(label="block", order=cells["place"].cat.categories),
        y=Axis(label="share of the draws", limits=(0, None)),
        caption=caption,
        meta=cohort.meta,
    )
