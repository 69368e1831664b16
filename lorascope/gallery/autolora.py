"""Figures of AutoLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lorascope import plots
from lorascope.charts.chart import Chart, Panels, stack_vertically
from lorascope.charts.marks import Axis, Heat
from lorascope.evidence import registration
from lorascope.evidence.statistics import autolora as statistics
from lorascope.gallery.base import GalleryFigure, own_labels

HEADING = "AutoLoRA"


def _draw_ranks(runs: Mapping[str, Sequence[Any]]) -> Panels:
    """Plot the found ranks, and below them those of the authors' lists."""
    ranks = pd.read_csv(registration.FILE.parent / "published" / "autolora_ranks.csv")
    count = ranks["list"].nunique()
    cells = ranks.groupby(["projection", "layer"])["rank"].mean().rename("value").reset_index()
    deviation = ranks.groupby("list")["rank"].std().mean()
    authors = Chart(
        cells,
        [Heat("layer", "projection", "value", "rank", ".1f")],
        title="authors' lists",
        x=Axis(label="layer", order=sorted(cells["layer"].unique())),
        y=Axis(order=["q", "v"]),
        caption=f"Authors' lists: mean of {count} lists of RoBERTa-base with starting rank 8. Standard deviation of "
        f"the ranks of one list: {deviation:.2f}.",
    )
    return stack_vertically(plots.rank_allocation(runs), authors)


FIGURES = [
    GalleryFigure(
        name="rank-by-task",
        alt="Ranks that AutoLoRA finds for two tasks, ranks from random logits, and those of the authors' lists",
        arms={"sentiment": statistics.ADAPTED, "domains": statistics.DOMAINS, "random logits": statistics.RANDOM},
        draw=_draw_ranks,
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
