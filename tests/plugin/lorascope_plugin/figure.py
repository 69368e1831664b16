"""A figure of the number of adapted modules per role."""

from __future__ import annotations

import pandas as pd

from lorascope.charts.chart import Chart
from lorascope.charts.marks import Bar
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Runs


@figure(topic="updates", needs=("updates",), reads="A bar is a role.", misleads="Modules differ in size.")
def module_counts(runs: Runs, control: Runs | None = None) -> Chart:
    """Draw the number of adapted modules per role."""
    cohort = gather_runs("module_counts", runs, control)
    table = pd.concat([run.summary() for run in cohort.runs])
    counts = table.groupby("role", observed=True).size().rename("count").reset_index()
    return cohort.complete(Chart(counts.astype({"role": str}), [Bar("role", "count")], title="Adapted modules"))
