"""Figures of NeFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis import selected_neurons
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis
from lorascope.evidence import registration
from lorascope.evidence.statistics.lora import FULL, LOW
from lorascope.evidence.statistics.neft import CHANGED, FEW, MOVIES, PROBED, RANDOM, REVERSED, TWEETS, UTILIZATION
from lorascope.gallery.base import GalleryFigure, accuracy_bars, own_labels, training_loss
from lorascope.gallery.printed_numbers import printed
from lorascope.plots.builders import add_printed, bars, curves
from lorascope.plots.run_groups import INTERVAL

HEADING = "NeFT"
_RANKS = 352_256  # of the neurons of one projection of LLaMA-2 7B, the paper's model


def _draw_accuracy(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="NeFT", table="Figure 3")
    further = numbers["method"].str.extract("(lowest|highest), x = 6$")[0]  # in percent, after 3% of the lowest cosine
    recipe = further.map({"lowest": "NeFT, 9%", "highest": "reversed"})
    numbers = numbers.assign(recipe=recipe, source="printed").dropna(subset="recipe")
    chart = accuracy_bars(runs, "Accuracy by selection of neurons", start=0.5)
    return add_printed(chart, numbers, "recipe", "NeFT, figure 3, COMET of a translation")


def _draw_use(runs: Mapping[str, Sequence[Any]]) -> Chart:
    """Plot the kept tables ``utilization``: mean shift of the ranks from those of NeFT, 3%, with the same seed."""
    shifts = []
    for label in (CHANGED, REVERSED):
        for run, reference in zip(runs[label], runs[FEW], strict=True):
            before, after = (each.tables[UTILIZATION].astype({"rank": "float64"}) for each in (reference, run))
            moved = (after["rank"] - before["rank"]).abs() / after.groupby("role")["rank"].transform("size")
            shifts.append({"recipe": label, "run": run.id, "value": moved.mean()})
    numbers = printed(paper="NeFT", table="Figure 4 (a)")
    numbers = numbers.assign(recipe=numbers["method"].map({"NeFT, 9 %": CHANGED, "3 % and 6 % reversed": REVERSED}))
    numbers = numbers.dropna(subset="recipe").assign(value=100 * numbers["value"] / _RANKS, source="printed")
    chart = bars(
        band(pd.DataFrame(shifts), ["recipe"]),
        "recipe",
        (Axis(order=[CHANGED, REVERSED]), "mean shift (fraction of the ranks)"),
        title=f"Shift in utilization rank from {FEW}",
        caption="Neurons of each role are ranked by utilization and compared with NeFT, 3%, of the same seed. "
        f"Mean of {len(runs[FEW])} seeds; bars: {INTERVAL}.",
    )
    return add_printed(chart, numbers, "recipe", f"NeFT, figure 4 (a), divided by {_RANKS:,} ranks")


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
        name="accuracy-neft",
        alt="Accuracy of NeFT by selection of neurons, of full fine-tuning and of LoRA, and printed numbers",
        arms={
            "NeFT, 9%": CHANGED,
            "NeFT, 3%": FEW,
            "reversed": REVERSED,
            "probes": PROBED,
            "random": RANDOM,
            "full": FULL,
            "LoRA": LOW,
        },
        draw=_draw_accuracy,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="training-curves-neft",
        alt="Training loss: full fine-tuning, NeFT and LoRA",
        arms=own_labels(FULL, CHANGED, LOW),
        draw=training_loss,
        quantities=("loss",),
    ),
    GalleryFigure(
        name="use-shift",
        alt="Mean shift in utilization rank of neurons, largest and smallest rotation, and printed numbers",
        arms=own_labels(CHANGED, REVERSED, FEW),
        draw=_draw_use,
        seeds=None,
        scores_only=True,
        table=UTILIZATION,
    ),
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
