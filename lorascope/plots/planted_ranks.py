"""Figure of planted ranks: the rank that an allocator finds for modules that need a known rank."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis.planted_ranks import recovered_ranks
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Chart, Line
from lorascope.plots.builders import curves
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import Cohort

_TRUTH = "planted rank"


@figure(
    topic="ranks",
    needs=("planted_rank",),
    reads="A line along the diagonal assigns rank where the teacher needs it; a flat line, such as a uniform rank, "
    "ignores the need. Where bands overlap, these seeds do not distinguish two allocators.",
    misleads="Planted components have similar sizes, unlike those of a real task: confirm the result there. A method "
    "whose ranks cannot exceed the initial rank, or cannot reach 0, must leave the diagonal at that end.",
    takes="Runs of ``lorascope reproduce --probe planted``, and runs to compare with.",
)
def planted(cohort: Cohort) -> Chart:
    """Plot found rank against planted rank, one line per recipe.

    Examples
    --------
    >>> ls.plots.planted({"AdaLoRA": planted})
    """
    found = pd.concat([recovered_ranks(run) for run in cohort.runs])
    means = found.groupby(["run", "planted"], sort=True)["found"].mean().rename("value").reset_index()
    cells = band(cohort.label(means), ["recipe", "kind", "planted"])
    truth = pd.DataFrame({"planted": sorted(set(means["planted"]))}).assign(recipe=_TRUTH)
    return curves(
        cells,
        "planted",
        ("rank of the teacher's update", Axis(label="found rank", limits=(0, None))),
        Line("planted", "planted", "recipe", data=truth),
        title="Found rank by planted rank",
        caption=cohort.caption("Found rank, mean over the modules with the same planted rank."),
        colors=[*cohort.labels, _TRUTH],
    )
