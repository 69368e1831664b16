"""Overview of one run: the figures that a report of its training shows as pictures."""

from __future__ import annotations

from pathlib import Path

from lorascope.plots.registry import FIGURES
from lorascope.plots.requirements import missing_reason
from lorascope.runs.run import Run

# Cheap to draw, and readable without a second run.
OVERVIEW = ("update_norm_heat", "rank_allocation", "spectrum", "importance")


def save_overview(run: Run, folder: Path) -> list[Path]:
    """Save those figures of the overview that the run has the records for, as PNG files with the figures' names."""
    figures = [FIGURES[name] for name in OVERVIEW]
    drawable = [each for each in figures if not any(missing_reason(run, need, each.history) for need in each.needs)]
    return [each.draw(run).save(folder / f"{each.name}.png") for each in drawable]
