"""Overview of one run: the figures that a report of its training shows as images."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lorascope.plots.figure_registry import FIGURES
from lorascope.plots.requirements import missing_reason
from lorascope.runs.run import Run

# Cheap to draw, and readable without a second run.
OVERVIEW = ("update_norm_heat", "rank_allocation", "spectrum", "importance")


def save_overview(run: Run, folder: Path) -> list[Path]:
    """Save the overview of a run: the figures that it can be drawn as, in PNG files with the names of the figures."""
    files = []
    for name in OVERVIEW:
        figure = FIGURES[name]
        if any(missing_reason(run, need, figure.history) for need in figure.needs):
            continue
        with suppress(ValueError):  # such as a figure by block of a model without blocks
            files.append(figure.draw(run).save(folder / f"{figure.name}.png"))
    return files
