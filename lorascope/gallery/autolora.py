"""Figures of AutoLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope import plots
from lorascope.charts.chart import Chart, Panels, set_side_by_side, stack_vertically
from lorascope.charts.marks import Axis, Heat
from lorascope.evidence import registration
from lorascope.evidence.statistics import autolora as statistics
from lorascope.gallery.base import GalleryFigure, own_labels

HEADING = "AutoLoRA"


def _draw_ranks(runs: Mapping[str, Sequence[Any]]) -> Panels:
    """Plot the found ranks, and below them those of the authors' lists."""
    published = registration.FILE.parent / "published"
    ranks, chance = (pd.read_csv(published / f"autolora_{name}.csv") for name in ("ranks", "chance"))
    count = ranks["list"].nunique()
    cells = ranks.groupby(["projection", "layer"])["rank"].mean().rename("value").reset_index()
    deviation = ranks.groupby("list")["rank"].std().mean()
    found = plots.rank_allocation(runs).charts()
    caption = (
        f"{found[0].caption} Authors' lists: mean of {count} lists of RoBERTa-base with starting rank 8; standard "
        f"deviation of the ranks of one list: {deviation:.2f}, by random logits: {chance['expected_sd_of_24'][0]:.2f}."
    )
    authors = Chart(
        cells,
        [Heat("layer", "projection", "value", "rank", ".1f", limits=(0.0, float(cells["value"].max())))],
        title="authors' lists",
        x=Axis(label="layer", order=sorted(cells["layer"].unique())),
        y=Axis(order=["q", "v"]),
        caption=caption,
    )
    return stack_vertically(set_side_by_side(*(replace(chart, caption=caption) for chart in found)), authors)


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
