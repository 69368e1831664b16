"""A figure of the number of adapted modules per role."""

from __future__ import annotations

from typing import Any

from lorascope.charts.chart import Chart
from lorascope.charts.marks import Bar
from lorascope.plots.registry import figure


@figure(topic="updates", needs=("updates",), reads="A bar is a role.", misleads="Modules differ in size.")
def module_counts(runs: Any) -> Chart:
    """Draw the number of adapted modules per role."""
    table = runs.summary().groupby("role", observed=True).size().rename("count").reset_index()
    return Chart(table.astype({"role": str}), [Bar("role", "count")], title="Adapted modules")
