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

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope import observe
from lorascope.analysis import norms, selected_neurons
from lorascope.evidence.statistics.neft import (
    CHANGED,
    FEW,
    MOVIES,
    PROBED,
    RANDOM,
    REVERSED,
    SELECTED,
    TWEETS,
    UTILIZATION,
)
from lorascope.methods import NeFT
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.probes.base import Arm, Probe, encoder_settings
from lorascope.runs.run import Run


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
        Arm(label=FEW, method=three, settings=seen),
        Arm(label=REVERSED, method=replace(three, reversed_share=0.06), settings=seen),
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
    run = {CHANGED: runs[CHANGED]}
    return [draw(figure, run) for figure in ("neurons", "neuron_cosine", "rank_shift")]


PROBE = Probe(
    name="neft",
    title="NeFT: choice of the trained neurons",
    source="Xu et al., NeFT, arXiv 2403.11621",
    question="Do the neurons that rotate most in full fine-tuning outperform others, and are they task-specific?",
    arms=arms,
    keep={(SELECTED, label): keep_selected for label in (CHANGED, MOVIES, TWEETS)}
    | {(UTILIZATION, label): keep_utilization for label in (CHANGED, FEW, REVERSED)},
    figures=figures,
    notes=("NeFT's full fine-tuning before the choice counts in its time, but not in its steps.",),
)
