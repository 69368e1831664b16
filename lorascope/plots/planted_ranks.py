"""The figure of planted truth: what rank an allocator gives to modules that need a known one."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis.planted_ranks import recovered_ranks
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Chart, Line
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import Runs, gather, lines

_TRUTH = "what was planted"


@figure(
    needs=("planted_rank",),
    reads="A line that climbs along the diagonal gives rank where the teacher needs it; a flat one, such as the same "
    "rank everywhere, knows nothing of the need. Where bands overlap, these seeds do not tell two allocators apart.",
    misleads="Planted components are alike in size, which those of a real task are not. A method whose ranks cannot "
    "pass those at its start, or cannot reach 0, must bend away from the diagonal at that end.",
)
def planted(runs: Runs, control: Runs | None = None) -> Chart:
    """Rank found against rank planted, one line a recipe; runs of ``lorascope reproduce --probe planted``.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    """
    cohort = gather("planted", runs, control)
    cohort.require("planted_rank")
    found = pd.concat([recovered_ranks(run) for run in cohort.runs])
    means = found.groupby(["run", "planted"], sort=True)["found"].mean().rename("value").reset_index()
    cells = band(cohort.label(means), ["recipe", "kind", "planted"])
    truth = pd.DataFrame({"planted": sorted(set(means["planted"]))}).assign(recipe=_TRUTH)
    return Chart(
        cells,
        [*lines(cells, "planted"), Line("planted", "planted", "recipe", data=truth)],
        title="Found rank against needed rank",
        x=Axis(label="rank of the teacher's update"),
        y=Axis(label="rank found", limits=(0, None)),
        caption=cohort.caption("Mean rank found over the modules of one planted rank."),
        colors=[*cohort.labels, _TRUTH],
        meta=cohort.meta,
    )
