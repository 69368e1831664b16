"""Figures of AutoLoRA."""

from __future__ import annotations

from lorascope import plots
from lorascope.evidence.statistics import autolora as statistics
from lorascope.gallery.base import GalleryFigure, own_labels

HEADING = "AutoLoRA"


FIGURES = [
    GalleryFigure(
        name="rank-by-task",
        alt="Ranks that AutoLoRA finds for two tasks, and ranks from random logits",
        arms={"sentiment": statistics.ADAPTED, "domains": statistics.DOMAINS, "random logits": statistics.RANDOM},
        draw=plots.rank_allocation,
        quantities=("rank",),
    ),
    GalleryFigure(
        name="selection-weights",
        alt="Selection weights of retained and dropped components in AutoLoRA's search",
        arms=own_labels(statistics.ADAPTED),
        draw=lambda runs: plots.importance(
            {label: [run.parents[0] for run in of] for label, of in runs.items()}, quantity="alpha"
        ),
        quantities=("alpha", "rank"),
    ),
]
