"""Probe of NeFT: accuracy by choice of neurons, overlap of choices between seeds and domains, and utilization shifts.

Source: NeFT (arXiv 2403.11621), section 5.2 and table 2 (quality), section 5.4 and table 6 (overlap), figure 3
(reversed selection), figure 4 (utilization), section 3 and table 1 (choice by linear probes).

Departs:

- A small encoder and two domains of one dataset instead of LLaMA-2 and translation.
- Neurons are chosen after a third of the steps; the authors find choices after a quarter equally good.
- Two controls are this project's own: random neurons of the same number, and the expected overlap of random choices
  with the same number of neurons per module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope import observe, plots
from lorascope.analysis import norms, selected_neurons
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis
from lorascope.evidence import registration
from lorascope.evidence.statistics import neft as statistics
from lorascope.methods import NeFT
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.plots.builders import add_printed, curves
from lorascope.probes.base import Arm, EvidenceFigure, Probe, encoder_settings, own_labels
from lorascope.runs.run import Run

CHANGED, REVERSED, RANDOM = "NeFT, 9%", "NeFT, 9%, reversed", "NeFT, 9%, random"
PROBED = "NeFT, 9%, linear probes"
MOVIES, TWEETS = "NeFT, choice only, movies", "NeFT, choice only, tweets"


def arms() -> list[Arm]:
    """Return the registered arms: NeFT by four choices, with fewer neurons, and its choice on two domains."""
    settings = encoder_settings()
    steps = settings["steps"]
    seen = encoder_settings(steps, observe.utilization(every=steps))
    # The tuning before the choice has the middle rate of full fine-tuning, at any rate of the neurons.
    nine = NeFT(parameter_share=0.09, tune_steps=steps // 3, tune_lr=1e-4)
    three = replace(nine, parameter_share=0.03)
    # One step suffices for arms that only choose neurons.
    choice: dict[str, Any] = encoder_settings(1)
    return [
        Arm(label=CHANGED, method=nine, settings=seen),
        Arm(label=RANDOM, method=replace(nine, select_by="random"), settings=settings),
        Arm(label=PROBED, method=replace(nine, select_by="probed"), settings=settings),
        Arm(label=statistics.FEW, method=three, settings=seen),
        Arm(label=statistics.REVERSED, method=replace(three, reversed_share=0.06), settings=seen),
        Arm(label=MOVIES, method=nine, task="sentiment/movies", settings=choice),
        Arm(label=TWEETS, method=nine, task="sentiment/tweets", settings=choice),
    ]


def keep_selected(run: Run) -> pd.DataFrame:
    """Return the kept table ``selected``; see ``evidence.statistics.neft``."""
    found = selected_neurons.list_selected(run)[["module", "neuron"]].astype({"module": "str", "neuron": "uint16"})
    sizes = selected_neurons.sizes(run)
    found = found.assign(size=found["module"].map(sizes).astype("uint16"), pool=sizes.total())
    return found.sort_values(["module", "neuron"], ignore_index=True)[["module", "size", "pool", "neuron"]]


def keep_utilization(run: Run) -> pd.DataFrame:
    """Return the kept table ``utilization``, after the last step; see ``evidence.statistics.neft``."""
    rows = norms.last(run.table[run.table["quantity"] == "utilisation"]).astype({"module": "str", "role": "str"})
    rows = rows.sort_values(["role", "module", "index"], ignore_index=True)
    rank = rows.groupby("role")["value"].rank(method="first", ascending=False)
    return rows[["role"]].assign(rank=rank.astype("uint16"))


def figures(runs: Mapping[str, Run]) -> list[ReportFigure]:
    """Draw the chosen neurons, their rotation, and the shifts of utilization."""
    run = {statistics.CHANGED: runs[statistics.CHANGED]}
    return [draw(figure, run) for figure in ("neurons", "neuron_cosine", "rank_shift")]


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


def evidence_figures() -> list[EvidenceFigure]:
    """Return the figures of the chosen neurons, their rotation and overlap, and the shifts of utilization."""
    return [
        EvidenceFigure(
            name="neurons",
            alt="Selected neurons by layer and projection: largest and smallest rotation, random, linear probes",
            arms=own_labels(CHANGED, statistics.REVERSED, RANDOM, PROBED),
            draw=plots.neurons,
        ),
        EvidenceFigure(
            name="neuron-cosine",
            alt="Cosine distance of neurons by layer, and the selection threshold",
            arms=own_labels(CHANGED),
            draw=plots.neuron_cosine,
        ),
        EvidenceFigure(
            name="neuron-overlap",
            alt="Overlap of selected neurons between domains and between seeds",
            arms={"all": CHANGED, "movies": MOVIES, "tweets": TWEETS},
            draw=plots.neuron_overlap,
        ),
        EvidenceFigure(
            name="overlap-by-size",
            alt="Overlap of selected neurons between seeds by size of the selection, at chance, and printed numbers",
            arms=own_labels(CHANGED),
            draw=_draw_overlap,
        ),
        EvidenceFigure(
            name="rank-shift",
            alt="Shift of neurons in utilization rank, by percentile and kind",
            arms=own_labels(CHANGED, statistics.FEW, statistics.REVERSED),
            draw=plots.rank_shift,
        ),
    ]


PROBE = Probe(
    name="neft",
    title="NeFT: choice of the trained neurons",
    source="Xu et al., NeFT, arXiv 2403.11621",
    question="Do the neurons that rotate most in full fine-tuning outperform others, and are they task-specific?",
    arms=arms,
    keep={(statistics.SELECTED, label): keep_selected for label in (CHANGED, MOVIES, TWEETS)}
    | {(statistics.UTILIZATION, label): keep_utilization for label in (CHANGED, statistics.FEW, statistics.REVERSED)},
    figures=figures,
    evidence_figures=evidence_figures,
    notes=("NeFT's full fine-tuning before the choice counts in its time, but not in its steps.",),
)
