"""Probe of NeFT: accuracy by choice of neurons, overlap of choices between seeds and domains, and utilization shifts.

Source: NeFT (arXiv 2403.11621), section 5.2 and table 2 (quality), section 5.4 and table 6 (overlap), figure 3
(reversed selection), figure 4 (utilization), section 3 and table 1 (choice by linear probes).

Departs:

- A small encoder and two domains of one dataset instead of LLaMA-2 and translation.
- Learning rates equal those of full fine-tuning here; the authors also use one rate for both.
- Neurons are chosen after a third of the steps; the authors find choices after a quarter equally good.
- "Reversed" trains only neurons from the other end of the order; the authors add these to their 3%.
- Two controls are this project's own: random neurons of the same number, and the expected overlap of random choices
  with the same number of neurons per module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorascope import observe
from lorascope.analysis import neuron_utilization, norms, selected_neurons
from lorascope.evidence.statistics import neft as statistics
from lorascope.methods import NeFT
from lorascope.probes.base import (
    Arm,
    Probe,
    ReportFigure,
    draw,
    encoder_settings,
    over_seeds,
    registered_settings,
    select,
    tabulate,
)
from lorascope.probes.lora import FULL, LOW, shared_arms
from lorascope.probes.rank_statistics import NEXT_SEED
from lorascope.probes.seed_statistics import EachRun, NextSeed, Runs, accuracy
from lorascope.runs.run import Run

CHANGED, REVERSED, RANDOM = "NeFT, 9%", "NeFT, 9%, reversed", "NeFT, 9%, random"
PROBED = "NeFT, 9%, linear probes"
TRAINED = (CHANGED, REVERSED, RANDOM, PROBED)
"""Arms with a full training, not only a choice of neurons."""
MOVIES, TWEETS = "NeFT, choice only, movies", "NeFT, choice only, tweets"


def arms(quick: bool) -> list[Arm]:
    """Return the arms: NeFT, its controls, full fine-tuning and LoRA, and NeFT's choice of neurons on two domains.

    A full run also has NeFT with neurons chosen by linear probes. Full fine-tuning and LoRA are arms of the LoRA probe.
    """
    settings = encoder_settings(quick) | ({"steps": 12, "eval_every": 0, "test_size": 200} if quick else {})
    steps = settings["steps"]
    settings["observe"] = [*settings["observe"][:1], observe.utilization(every=steps)]
    neft = partial(NeFT, parameter_share=0.09, lr=1e-4, head_lr=1e-4, tune_steps=steps // 3)
    # One step suffices for arms that only choose neurons.
    choice: dict[str, Any] = settings | {"steps": 1, "eval_every": 0, "eval_size": 100, "test_size": 100}
    tuned = 1 + steps // 3 / steps
    probed = Arm(label=PROBED, method=neft(select_by="probed"), settings=settings, cost=tuned)
    return [
        *shared_arms(quick, FULL, LOW),
        Arm(label=CHANGED, method=neft(), settings=settings, cost=tuned),
        Arm(label=REVERSED, method=neft(select_by="reversed"), settings=settings, cost=tuned),
        Arm(label=RANDOM, method=neft(select_by="random"), settings=settings),
        *([] if quick else [probed]),
        *(
            Arm(label=label, method=neft(), task=task, settings=choice, cost=1.0 + steps // 3)
            for label, task in ((MOVIES, "sentiment/movies"), (TWEETS, "sentiment/tweets"))
        ),
    ]


def registered() -> list[Arm]:
    """Return the registered arms: NeFT by four choices, with fewer neurons, and its choice on two domains."""
    settings = registered_settings()
    steps = settings["steps"]
    seen = registered_settings(steps, observe.utilization(every=steps))
    # The tuning before the choice has the middle rate of full fine-tuning, at any rate of the neurons.
    nine = NeFT(parameter_share=0.09, tune_steps=steps // 3, tune_lr=1e-4)
    three = replace(nine, parameter_share=0.03)
    # One step suffices for arms that only choose neurons.
    choice: dict[str, Any] = registered_settings(1)
    return [
        Arm(label=CHANGED, method=nine, settings=seen),
        Arm(label=RANDOM, method=replace(nine, select_by="random"), settings=settings),
        Arm(label=PROBED, method=replace(nine, select_by="probed"), settings=settings),
        Arm(label=statistics.FEW, method=three, settings=seen),
        Arm(label=statistics.REVERSED, method=replace(three, reversed_share=0.06), settings=seen),
        Arm(label=MOVIES, method=nine, task="sentiment/movies", settings=choice),
        Arm(label=TWEETS, method=nine, task="sentiment/tweets", settings=choice),
    ]


def chosen(run: Run) -> selected_neurons.Neurons:
    """Return the neurons that a run selected."""
    return selected_neurons.as_set(selected_neurons.list_selected(run))


def overlap(first: Run, second: Run) -> float:
    """Compute the overlap of the choices of two runs, as a fraction of the neurons."""
    return selected_neurons.common(chosen(first), chosen(second), selected_neurons.sizes(first).total())["overlap"]


def expected_overlap(first: Run, second: Run) -> float:
    """Compute the expected overlap of random choices with as many neurons per module as those of two runs."""
    return selected_neurons.compute_expected_overlap(chosen(first), chosen(second), selected_neurons.sizes(first))


def mean_shift(run: Run) -> float:
    """Compute the mean absolute shift of a neuron's utilization rank, as a fraction of the ranks of its projection."""
    shifts = neuron_utilization.shifts(run.table, selected_neurons.trained(run))
    sizes = shifts.groupby("role")["rank_1"].transform("size")
    return float((shifts["d_rank"].abs() / sizes).mean())


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


def figures(runs: Runs) -> list[ReportFigure]:
    """Draw the chosen neurons, their overlap, the shifts of utilization, and the training curves."""
    neft = select(runs, *TRAINED)
    return [
        draw("neurons", neft),
        draw("neuron_cosine", select(runs, CHANGED)),
        draw("neuron_overlap", {"all": runs[CHANGED], "movies": runs[MOVIES], "tweets": runs[TWEETS]}),
        draw("rank_shift", neft),
        draw("training_curves", select(runs, FULL, LOW, *TRAINED)),
    ]


def trained_fraction(runs: Sequence[Run]) -> str:
    """Format the fraction of the parameters that the runs of an arm train."""
    counted = runs[0].meta.parameters
    return f"{counted.trained / (counted.total or 1):.1%}"


_COLUMNS = {
    "accuracy": over_seeds(lambda run: 100 * accuracy(run), 1),
    "trained": trained_fraction,
    "seconds": lambda runs: f"{np.mean([run.meta.total_seconds for run in runs]):.0f}",  # with the tuning phase
}

PROBE = Probe(
    name="neft",
    title="NeFT: choice of the trained neurons",
    source="Xu et al., NeFT, arXiv 2403.11621",
    question="Do the neurons that rotate most in full fine-tuning outperform others, and are they task-specific?",
    quick_budget=105,
    arms=arms,
    registered=registered,
    keep={(statistics.SELECTED, label): keep_selected for label in (CHANGED, MOVIES, TWEETS)}
    | {(statistics.UTILIZATION, label): keep_utilization for label in (CHANGED, statistics.FEW, statistics.REVERSED)},
    claims={
        "neft.over_full": (EachRun(accuracy, CHANGED), EachRun(accuracy, FULL)),
        "neft.over_lora": (EachRun(accuracy, CHANGED), EachRun(accuracy, LOW)),
        "neft.choice": (EachRun(accuracy, CHANGED), EachRun(accuracy, RANDOM)),
        "neft.reversed": (EachRun(accuracy, CHANGED), EachRun(accuracy, REVERSED)),
        "neft.probed": (EachRun(accuracy, PROBED), EachRun(accuracy, RANDOM)),
        "neft.layers": (NextSeed(overlap, CHANGED, CHANGED), NextSeed(expected_overlap, CHANGED, CHANGED)),
        "neft.task": (NextSeed(overlap, MOVIES, MOVIES), NextSeed(overlap, MOVIES, TWEETS)),
        "neft.use": (EachRun(mean_shift, REVERSED), EachRun(mean_shift, CHANGED)),
    },
    figures=figures,
    tables=lambda runs: {"NeFT": tabulate(select(runs, FULL, LOW, *TRAINED), _COLUMNS)},
    notes=lambda runs: [
        "Held fixed: model, data, splits, batch size, number of steps. Seeds vary the classifier head, adapter "
        "initialization, data order, dropout and random neurons.",
        "NeFT's full fine-tuning before the choice counts in its time, but not in its steps. LoRA of rank 8 trains "
        f"{trained_fraction(runs[LOW])} of the parameters, NeFT {trained_fraction(runs[CHANGED])}.",
        NEXT_SEED,
        "A quick run trains NeFT for fewer steps than its baselines, and has no choice by linear probes.",
    ],
    former_labels={
        "NeFT, 9 %": CHANGED,  # prose: ok
        "NeFT, 9 %, reversed": REVERSED,
        "NeFT, 9 %, random": RANDOM,
        "NeFT, 9 %, probed": PROBED,
        "NeFT, choice alone, movies": MOVIES,  # prose: ok
        "NeFT, choice alone, tweets": TWEETS,  # prose: ok
    },
)
