"""Figure of the planted ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lorascope.charts.chart import Chart
from lorascope.evidence.statistics.planted import ADALORA, ALORA, AUTOLORA, RECOVERY, UNIFORM
from lorascope.gallery.base import GalleryFigure
from lorascope.plots.rank_allocations import found_by_planted
from lorascope.plots.run_groups import gather

HEADING = "Planted ranks"
_ALLOCATORS = {"AdaLoRA": ADALORA, "AutoLoRA": AUTOLORA, "ALoRA": ALORA}


def _draw(runs: Mapping[str, Sequence[Any]]) -> Chart:
    """Plot the kept tables ``recovery``; uniform ranks have none, but share the planted ranks of their seed."""
    truths = {run.seed: run.tables[RECOVERY] for run in runs["AdaLoRA"]}
    uniform = [truths[run.seed].assign(run=run.id, found=run.meta.method["rank"]) for run in runs["uniform ranks"]]
    allocated = [run.tables[RECOVERY].assign(run=run.id) for name in _ALLOCATORS for run in runs[name]]
    found = pd.concat([*allocated, *uniform])
    return found_by_planted(gather("planted", runs), found)


FIGURES = [
    GalleryFigure(
        name="planted",
        alt="Rank found by planted rank, for three allocators and uniform ranks",
        arms=_ALLOCATORS | {"uniform ranks": UNIFORM},
        draw=_draw,
        seeds=None,
        scores_only=True,
    )
]
