"""Figure of the course of learning and forgetting: task loss against the distance from the base, along the steps."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis.forgetting_course import DISTANCES, forgetting_course
from lorascope.charts.chart import Chart, Drawable, wrap
from lorascope.charts.marks import Axis, Line, Point
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Runs
from lorascope.schema.records import QUANTITIES


@figure(
    topic="schedules",
    needs=("row_loss",),
    history=True,
    reads="Each point is a step: training moves from the right, where nothing is learned and nothing forgotten, to the "
    "left and up. The ringed step is the one to keep, the nearest to the base of those whose loss is as low as the "
    "best within one standard error.",
    misleads="The distance from the base does not show that an earlier task is forgotten: pass its rows as keep, and "
    "read their loss. The rows of one run say nothing about another seed.",
)
def kl(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot the distance from the base on rows to keep over the task loss, step by step, one panel per run.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs with ``observe.kl``, and those to compare with.

    Examples
    --------
    ``gauged`` is a run with ``observe.kl``.

    >>> ls.plots.kl(gauged)
    """
    cohort = gather_runs("kl", runs, control)
    panels, results = [], []
    for group in cohort.groups:
        for run in group.runs:
            title = group.run_names[run.id] if len(group.runs) > 1 else cohort.title(group.label)
            course = forgetting_course(run)
            ringed = course[course["keep"]]
            (row,) = ringed.to_dict("records")
            step, loss, distance = row["step"], row["loss"], row["distance"]
            results.append(f"{title or 'Keep'}: step {step}, loss {loss:.3g} nats, distance {distance:.3g}")
            recorded = set(run.table["quantity"])
            quantity = QUANTITIES[next(name for name in DISTANCES if name in recorded)]
            unit = f" ({quantity.unit})" if quantity.unit else ""
            path = Line("loss", "distance", stretch="stretch", data=_stretches(course))
            ring = Point("loss", "distance", symbol="circle-open", label="step to keep", data=ringed)
            marks = [path, Point("loss", "distance", "step"), ring]
            axes = Axis(label="task loss (nats)"), Axis(label=f"{quantity.label}{unit}")
            panels.append(Chart(course, marks, title=title, x=axes[0], y=axes[1]))
    caption = (
        "Distance from the base on rows to keep, and loss on validation rows of the task, at each recorded step. The "
        f"ringed step has the least distance within one paired standard error of the lowest loss. {'; '.join(results)}."
        f" {cohort.sample_sentence}"
    )
    title = "Distance from the base against task loss"
    return cohort.complete(wrap(panels, 3, title=title), caption)


def _stretches(course: pd.DataFrame) -> pd.DataFrame:
    """Return the two ends of each stretch of the path between successive steps, because lines follow their x."""
    numbered = course.assign(stretch=range(len(course)))
    starts, ends = numbered.iloc[:-1], numbered.iloc[1:]
    return pd.concat([starts, ends.assign(stretch=starts["stretch"].to_numpy())])
