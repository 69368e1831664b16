"""Figures of ALoRA."""

from __future__ import annotations

from lorascope import plots
from lorascope.evidence.statistics import alora as statistics
from lorascope.gallery.base import GalleryFigure, own_labels

HEADING = "ALoRA"


FIGURES = [
    GalleryFigure(
        name="rank-alora",
        alt="Ranks that ALoRA finds with its scores and with random ones",
        arms=own_labels(statistics.ADAPTED, statistics.RANDOM),
        draw=plots.rank_allocation,
        quantities=("rank",),
    ),
    GalleryFigure(
        name="rank-replay-alora",
        alt="Ranks of ALoRA over the steps, next to the budget",
        arms=own_labels(statistics.ADAPTED),
        draw=plots.rank_replay,
        seeds=1,
        quantities=("rank", "budget"),
    ),
    GalleryFigure(
        name="importance-alora",
        alt="ALoRA's scores of retained and dropped components over the rounds",
        arms=own_labels(statistics.ADAPTED),
        draw=plots.importance,
        quantities=("importance", "rank"),
    ),
]
