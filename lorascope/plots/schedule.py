"""The figure of what trained when: blocks drawn anew at intervals, and how many of them were ever reached."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis import schedule
from lorascope.analysis.stats import band
from lorascope.chart import Axis, Chart, Heat, Panels, above, beside
from lorascope.plots.catalogue import figure
from lorascope.plots.cohort import Cohort, Runs, axis_label, gather, lines

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
    cells = cohort.label(schedule.intervals(cohort.table))
    reached = cohort.label(schedule.coverage(cohort.table))
    caption = cohort.caption(
        "Left, the runs in which a block trained, by interval. Right, the blocks trained so far, and what such draws "
        "reach on average: the sum over the blocks of 1 − (1 − chance of a draw)ⁿ after n draws."
    )
    rows = [
        beside(_heat(cohort, cells, label, caption), _coverage(cohort, reached, label, caption))
        for label in cohort.labels
    ]
    return above(*rows)


def _heat(cohort: Cohort, cells: pd.DataFrame, label: str, caption: str) -> Chart:
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
