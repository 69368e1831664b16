"""Figures of AdaLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lorascope import plots
from lorascope.charts.chart import Chart
from lorascope.evidence.statistics import adalora as statistics
from lorascope.evidence.statistics.lora import LOW
from lorascope.gallery.base import GalleryFigure, own_labels
from lorascope.gallery.printed_numbers import printed
from lorascope.plots.builders import add_printed

HEADING = "AdaLoRA"


def _draw_accuracy(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="AdaLoRA", table="Table 1", data="SST-2")
    numbers = numbers.assign(recipe=numbers["method"].map({"AdaLoRA, budget 576": "AdaLoRA", LOW: LOW}))
    numbers = numbers.dropna(subset="recipe").assign(source="printed")
    chart = replace(plots.ablations(runs, start=0.5), title="AdaLoRA compared with uniform ranks")
    return add_printed(chart, numbers, "recipe", "AdaLoRA, table 1, SST-2")


_ADAPTED = own_labels(statistics.ADAPTED)
_by_place = partial(plots.adapted_types, start=0.5)  # the chance level

FIGURES = [
    GalleryFigure(
        name="rank-allocation",
        alt="Final ranks of AdaLoRA by layer and role, and a random allocation of the same budget",
        arms=_ADAPTED,
        draw=partial(plots.rank_allocation, chance=True),
        quantities=("rank",),
    ),
    GalleryFigure(
        name="rank-domains",
        alt="Final ranks of AdaLoRA on sentiment and on its domains",
        arms={"sentiment": statistics.ADAPTED, "domains": statistics.DOMAINS},
        draw=plots.rank_allocation,
        quantities=("rank",),
    ),
    GalleryFigure(
        name="rank-replay",
        alt="Ranks of AdaLoRA over the steps, next to the budget",
        arms=_ADAPTED,
        draw=plots.rank_replay,
        seeds=1,
        quantities=("rank", "budget"),
    ),
    GalleryFigure(
        name="importance",
        alt="Importance of retained and dropped components over the steps",
        arms=_ADAPTED,
        draw=plots.importance,
        quantities=("importance", "rank"),
    ),
    GalleryFigure(
        name="accuracy-adalora",
        alt="Accuracy of AdaLoRA, of its parametrization with uniform ranks, of LoRA, and printed numbers",
        arms={"AdaLoRA": statistics.ADAPTED, "AdaLoRA, uniform ranks": statistics.UNIFORM, LOW: LOW},
        draw=_draw_accuracy,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="adapted-types",
        alt="Accuracy of LoRA on one type of weight at a time, with equal parameters",
        arms=own_labels(*statistics.ATTENTION_TYPES, *statistics.FEED_FORWARD_TYPES),
        draw=_by_place,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="adapted-layers",
        alt="Accuracy of LoRA on the first two and on the last two layers, with equal parameters",
        arms=own_labels(statistics.BOTTOM, statistics.TOP),
        draw=_by_place,
        seeds=None,
        scores_only=True,
    ),
]
