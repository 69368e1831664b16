"""Figures of NeFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis import selected_neurons
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis
from lorascope.evidence import registration
from lorascope.evidence.statistics.neft import CHANGED, FEW, MOVIES, PROBED, RANDOM, REVERSED, TWEETS
from lorascope.gallery.base import GalleryFigure, own_labels
from lorascope.plots.builders import add_printed, curves

HEADING = "NeFT"


def _draw_overlap(runs: Mapping[str, Sequence[Any]]) -> Chart:
    """Plot the overlap between seeds by size of the selection, at the sizes of the paper's table 6."""
    numbers = pd.read_csv(registration.FILE.parent / "published" / "neft_overlap.csv")
    numbers = numbers[numbers["comparison"] == "two disjoint 20k samples of one corpus"]
    scores = [selected_neurons.scores(run, "selection_cosine") for run in runs[CHANGED]]
    pool = selected_neurons.sizes(runs[CHANGED][0]).total()
    cells = []
    for fraction in numbers["share_of_pool"]:
        choices = [selected_neurons.as_set(each.nlargest(round(fraction * pool), "value")) for each in scores]
        found = selected_neurons.overlaps({CHANGED: choices}, pool)
        for label, column in (("two seeds", "overlap"), ("chance", "chance")):
            cells.append({"fraction": fraction, "recipe": label, "value": found[column].mean()})
    chart = curves(
        pd.DataFrame(cells).assign(low=np.nan, high=np.nan),
        "fraction",
        ("fraction of all neurons selected", Axis(label="overlap", limits=(0, 1))),
        title="Overlap of selected neurons by size of the selection",
        caption=f"Largest cosine distances after the tuning phase; mean over the pairs of {len(scores)} seeds.",
    )
    printed = numbers.assign(fraction=numbers["share_of_pool"], value=numbers["overlap"], source="printed: two samples")
    return add_printed(chart, printed, "fraction", "NeFT, table 6, two samples of one corpus")


FIGURES = [
    GalleryFigure(
        name="neurons",
        alt="Selected neurons by layer and projection: largest and smallest rotation, random, linear probes",
        arms=own_labels(CHANGED, REVERSED, RANDOM, PROBED),
        draw=plots.neurons,
        quantities=("selected",),
    ),
    GalleryFigure(
        name="neuron-cosine",
        alt="Cosine distance of neurons by layer, and the selection threshold",
        arms=own_labels(CHANGED),
        draw=plots.neuron_cosine,
        quantities=("selection_cosine",),
    ),
    GalleryFigure(
        name="neuron-overlap",
        alt="Overlap of selected neurons between domains and between seeds",
        arms={"all": CHANGED, "movies": MOVIES, "tweets": TWEETS},
        draw=plots.neuron_overlap,
        quantities=("selected",),
    ),
    GalleryFigure(
        name="overlap-by-size",
        alt="Overlap of selected neurons between seeds by size of the selection, at chance, and printed numbers",
        arms=own_labels(CHANGED),
        draw=_draw_overlap,
        quantities=("selection_cosine",),
    ),
    GalleryFigure(
        name="rank-shift",
        alt="Shift of neurons in utilization rank, by percentile and kind",
        arms=own_labels(CHANGED, FEW, REVERSED),
        draw=plots.rank_shift,
        quantities=("update_norm", "utilisation"),
        seeds=2,
    ),
]
