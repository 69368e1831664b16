"""Figures of LISA's random draws: which blocks trained when and how often, and the test metric by draw settings."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis import lisa_schedule
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, stack_vertically, wrap
from lorascope.charts.marks import Axis, Band, Heat, Line, Point
from lorascope.files.lazy_scipy import binom
from lorascope.plots.builders import course
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import INTERVAL, PAIR_IN_DATA, Runs, axis_label


@figure(
    topic="schedules",
    needs=("active", "draw_probability"),
    reads="Each dot is a block that trained in that interval, larger if more seeds trained it. The right panel "
    "counts the blocks trained so far: below the expected line, fewer than random draws reach on average.",
    misleads="Parameters outside the blocks (embedding, norm, head) always train and are not shown, though they may be "
    "most of the model. With a decaying learning rate, blocks drawn late move little: check update_norm.",
)
def active_layers(runs: Runs, control: Runs | None = None) -> Panels:
    """Plot LISA's schedule: the blocks trained in each interval and the number trained so far, one row per recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with in the rows below.

    Examples
    --------
    ``lisa`` is a run of ``ls.LISA(interval=5)``.

    >>> ls.plots.active_layers(lisa)
    """
    cohort = gather_runs("active_layers", runs, control)
    intervals = cohort.label(lisa_schedule.list_intervals(cohort.table))
    coverages = cohort.label(lisa_schedule.block_coverage(cohort.table))
    caption = cohort.caption(
        "Left: blocks that trained in each interval; areas are fractions of the runs. Right: number of blocks trained "
        "so far at each draw, and its expectation after n draws, the sum over the blocks of 1 − (1 − p)ⁿ, where p is "
        "the draw probability."
    )
    rows = []
    for label, cells in cohort.split(intervals):
        active = cells.astype({"active": "float64"}).groupby(["start", "place"], observed=True)["active"]
        fractions = active.mean().rename("value").reset_index()
        blocks = list(map(str, fractions["place"].cat.categories))
        trained = fractions[fractions["value"] > 0].astype({"start": "str", "place": "str"})
        activity = Chart(
            trained,
            [Point("start", "place", size="value")],
            title=f"{label}: in each interval",
            x=Axis(label="first step of interval", order=list(map(str, sorted(set(cells["start"]))))),
            y=Axis(label="block", order=blocks[::-1]),  # the first block at the bottom
            caption=caption,
        )
        expected = f"{label}, expected from random draws"
        counts = coverages[coverages["recipe"] == label]
        series = pd.concat([counts, counts.assign(value=counts["expected"], recipe=expected)])
        coverage = course(
            seed_cells(series, ["recipe", "kind", "step"]),
            Axis(label=axis_label("coverage"), limits=(0, None)),
            title=f"{label}: so far",
            whiskers=False,
            caption=caption,
            colors=[label, expected],
        )
        rows.append(set_side_by_side(activity, coverage))
    return cohort.complete(stack_vertically(*rows, title="Blocks trained by LISA"))


@figure(
    topic="schedules",
    needs=("active", "draw_probability"),
    reads="Dots are the fraction of draws that include a block, the line is its draw probability. In the band are 95% "
    "of the fractions of as many random draws; several blocks outside it contradict the probability.",
    misleads="Few draws scatter widely, and blocks of one draw exclude others, so one high dot lowers the rest: add "
    "seeds. The frequency does not show how far a block moved: check update_norm.",
)
def draw_frequency(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot how often LISA's schedule drew each block, and its probability, one panel per recipe (section 3.2).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.

    Examples
    --------
    ``draws`` are runs of ``ls.LISA(interval=5)``, with and without ``weights``.

    >>> ls.plots.draw_frequency(draws)
    """
    cohort = gather_runs("draw_frequency", runs, control)
    visits = cohort.label(lisa_schedule.count_visits(cohort.table).rename(columns={"frequency": "value"}))
    caption = cohort.caption(
        "Fraction of draws that include a block; the line is its draw probability.",
        interval="intervals are in the data",
        pair=PAIR_IN_DATA,
    )
    panels = []
    for label, frequencies in cohort.split(visits):
        cells = seed_cells(frequencies, ["place"]).assign(what="drawn")
        by_block = frequencies.groupby("place", observed=True)
        cells["expected"] = by_block["expected"].mean().reindex(cells["place"]).to_numpy()
        # The draws of one block are independent, those of several are not.
        draws = by_block["draws"].sum().reindex(cells["place"]).to_numpy()
        random_draws = binom(draws, cells["expected"])
        random = cells[["place"]].assign(
            what="95% of random draws",
            low=random_draws.ppf(0.025) / draws,
            high=random_draws.ppf(0.975) / draws,
        )
        panels.append(
            Chart(
                cells,
                [
                    Band("place", "low", "high", "what", data=random),
                    Line("place", "expected", "what", data=cells.assign(what="probability")),
                    Point("place", "value", "what"),
                ],
                title=label,
                x=Axis(label="block", order=cells["place"].cat.categories),
                y=Axis(label="fraction of draws", limits=(0, None)),
                caption=caption,
                colors=("drawn", "probability", "95% of random draws"),
            )
        )
    return cohort.complete(wrap(panels, len(panels), "Frequency of drawn blocks"))


@figure(
    topic="schedules",
    needs=("active", "draw_probability", "test_metric"),
    runs=2,
    reads="Each cell is the test metric for a number of active blocks and of steps between draws; hatched cells: no "
    "data. Higher rows train more blocks at once, columns further right draw less often, down to a single draw.",
    misleads="More blocks also need more memory, so the best cell need not be the best choice: compare 0 blocks. All "
    "cells share one learning rate, which the paper lowers for more blocks; overlapping intervals do not order cells.",
)
def draw_grid(runs: Runs, control: Runs | None = None) -> Chart:
    """Plot test metric by LISA's schedule: active blocks and steps between draws (Table 6 and Figs. 7 to 9).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of LISA on one task that differ only in these two settings.

    Raises
    ------
    ValueError
        The runs differ in other settings, or two labels have the same cell.

    Examples
    --------
    ``lisa_grid`` are runs of ``ls.LISA(n_active=..., interval=...)``.

    >>> ls.plots.draw_grid(lisa_grid)
    """
    cohort = gather_runs("draw_grid", runs, control)
    cohort.require_differ_only_in("n_active", "interval")
    rows = cohort.scores().astype({"run": "str"}).merge(lisa_schedule.interval_sizes(cohort.table), on="run")
    for (blocks, steps), cell in rows.groupby(["blocks", "steps"]):
        labels = cell["recipe"].unique()
        if len(labels) > 1:
            raise ValueError(
                f"draw_grid needs one label per cell, got {' and '.join(labels)} for n_active {blocks} and interval "
                f"{steps}"
            )
    cells = seed_cells(rows, ["blocks", "steps"])
    digits = ".2f"
    if cells["value"].max() <= 1:  # a fraction, and no perplexity
        digits = ".3f"
    # As numbers in the cells, because a color cannot show an interval.
    halves = (cells["high"] - cells["low"]) / 2
    widths = halves.map(f" ± {{:{digits}}}".format).where(halves.notna(), "")
    cells = cells.assign(words=cells["value"].map(f"{{:{digits}}}".format) + widths)
    blocks_order, steps_order = (list(map(str, sorted(set(cells[name])))) for name in ("blocks", "steps"))
    return cohort.complete(
        Chart(
            cells.astype({"blocks": "str", "steps": "str"}),
            [Heat("steps", "blocks", "value", cohort.metric, digits, words="words")],
            title=cohort.metric_title(" by active blocks and interval"),
            x=Axis(label="steps between draws", order=steps_order),
            y=Axis(label="active blocks", order=blocks_order[::-1]),
            caption=cohort.caption(
                "Test metric after the last step; a run that is no longer than the interval draws once, and with 0 "
                "active blocks only the parameters outside the blocks train.",
                interval=f"±: {INTERVAL}",
                pair=PAIR_IN_DATA,
            ),
        )
    )
