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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorascope import observe, plots
from lorascope.analysis import neuron_utilization, selected_neurons
from lorascope.analysis.seed_intervals import t_interval
from lorascope.methods import NeFT
from lorascope.probes import lora
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, make_report_figure, register
from lorascope.probes.claims import Claim, Verdict
from lorascope.probes.lora import FULL, LOW
from lorascope.probes.rank_statistics import NEXT_SEED, BySeed, accuracy
from lorascope.runs.run import Run

CHANGED, REVERSED, RANDOM = "NeFT, 9%", "NeFT, 9%, reversed", "NeFT, 9%, random"
PROBED = "NeFT, 9%, linear probes"
MOVIES, TWEETS = "NeFT, choice only, movies", "NeFT, choice only, tweets"

OVER_FULL = Claim(
    sentence="NeFT outperforms full fine-tuning.",
    statistic="test accuracy of NeFT, 9% of the parameters",
    control="test accuracy of full fine-tuning after the same number of steps",
    margin=0.002,
    source="section 5.2, table 2",
)
OVER_LORA = Claim(
    sentence="NeFT outperforms LoRA of rank 8.",
    statistic="test accuracy of NeFT, 9% of the parameters",
    control="test accuracy of LoRA, rank 8 on all linear layers, after the same number of steps",
    margin=0.002,
    source="section 5.2, table 2",
)
OVER_RANDOM = Claim(
    sentence="Training the neurons that rotate most in full fine-tuning outperforms training random neurons.",
    statistic="test accuracy of NeFT, 9% of the parameters",
    control="the same with random neurons of the same number",
    margin=0.002,
    source="section 4.2",
)
OVER_REVERSED = Claim(
    sentence="Training the neurons that rotate most outperforms training the neurons that rotate least.",
    statistic="test accuracy of NeFT, 9% of the parameters",
    control="the same with the neurons of smallest cosine distance (reversed choice), same number",
    margin=0.002,
    source="figure 3",
)
BY_PROBES = Claim(
    sentence="Training the neurons most similar to linear probes outperforms training random neurons.",
    statistic="test accuracy of NeFT with neurons chosen by linear probes, 9% of the parameters",
    control="the same with random neurons of the same number",
    margin=0.002,
    source="section 3, table 1",
)
STABLE = Claim(
    sentence="The choices of two seeds overlap more than random choices within the same modules.",
    statistic="overlap of the choices of one seed and the next (fraction of neurons)",
    control="expected overlap of random choices with the same number of neurons per module",
    margin=0.05,
    source="section 5.4, table 6",
)
TASK = Claim(
    sentence="The choices of two seeds overlap more within a domain than between domains.",
    statistic="overlap of the choices of one seed and the next, both on movies (fraction of neurons)",
    control="overlap of the choice of one seed on movies and the next on tweets",
    margin=0.05,
    source="section 5.4",
)
PERTURBED = Claim(
    sentence="Training the neurons that rotate least shifts utilization ranks more than NeFT does.",
    statistic="mean absolute shift of a neuron's utilization rank, as a fraction of all ranks, reversed choice",
    control="the same for NeFT",
    margin=0.01,
    source="section 6.2, figure 4",
)


def arms(quick: bool) -> list[Arm]:
    """Return the arms: NeFT, its controls, full fine-tuning and LoRA, and NeFT's choice of neurons on two domains.

    A full run also has NeFT with neurons chosen by linear probes. Full fine-tuning and LoRA are arms of the LoRA probe.
    """
    settings = encoder_settings(quick) | ({"steps": 12, "eval_every": 0, "test_size": 200} if quick else {})
    steps = settings["steps"]
    settings["observe"] = [*settings["observe"][:1], observe.utilization(every=steps)]
    shared: dict[str, Any] = {"parameter_share": 0.09, "lr": 1e-4, "head_lr": 1e-4, "tune_steps": steps // 3}
    # One step suffices for arms that only choose neurons.
    choice = settings | {"steps": 1, "eval_every": 0, "eval_size": 100, "test_size": 100}
    tuned = 1 + shared["tune_steps"] / steps
    others = [arm for arm in lora.arms(quick) if arm.label in (FULL, LOW)]
    return [
        *others,
        Arm(label=CHANGED, method=NeFT(**shared), settings=settings, cost=tuned),
        Arm(label=REVERSED, method=NeFT(select_by="reversed", **shared), settings=settings, cost=tuned),
        Arm(label=RANDOM, method=NeFT(select_by="random", **shared), settings=settings),
        *(
            []
            if quick
            else [Arm(label=PROBED, method=NeFT(select_by="probed", **shared), settings=settings, cost=tuned)]
        ),
        *(
            Arm(label=label, method=NeFT(**shared), task=task, settings=choice, cost=1.0 + shared["tune_steps"])
            for label, task in ((MOVIES, "sentiment/movies"), (TWEETS, "sentiment/tweets"))
        ),
    ]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Compare accuracy with baselines, overlaps with chance, and utilization shifts with the reversed choice."""
    reached = {label: accuracy(runs[label]) for label in (FULL, LOW, *_trained_arms(runs))}
    verdicts = [
        claim.judge(reached[CHANGED], reached[control])
        for claim, control in ((OVER_FULL, FULL), (OVER_LORA, LOW), (OVER_RANDOM, RANDOM), (OVER_REVERSED, REVERSED))
    ]
    verdicts += [BY_PROBES.judge(reached[PROBED], reached[RANDOM])] if PROBED in runs else []
    # An overlap needs the choices of two seeds.
    verdicts += _choice_overlaps(runs) if len(runs[CHANGED]) > 1 else []
    verdicts.append(PERTURBED.judge(_mean_shifts(runs[REVERSED]), _mean_shifts(runs[CHANGED])))
    neft = {label: runs[label] for label in _trained_arms(runs)}
    choices = {"all": runs[CHANGED], "movies": runs[MOVIES], "tweets": runs[TWEETS]}
    figures = [
        make_report_figure("neurons", plots.neurons(neft)),
        make_report_figure("neuron_cosine", plots.neuron_cosine({CHANGED: runs[CHANGED]})),
        make_report_figure("neuron_overlap", plots.neuron_overlap(choices)),
        make_report_figure("rank_shift", plots.rank_shift(neft)),
        make_report_figure("training_curves", plots.training_curves({FULL: runs[FULL], LOW: runs[LOW], **neft})),
    ]
    notes = [
        "Held fixed: model, data, splits, batch size, number of steps. Seeds vary the classifier head, adapter "
        "initialization, data order, dropout and random neurons.",
        "NeFT's full fine-tuning before the choice counts in its time, but not in its steps. LoRA of rank 8 trains "
        f"{_trained_fraction(runs[LOW])} of the parameters, NeFT {_trained_fraction(runs[CHANGED])}.",
        NEXT_SEED,
        "A quick run trains NeFT for fewer steps than its baselines, and has no choice by linear probes.",
    ]
    return Findings(verdicts, figures, {"NeFT": table(runs)}, notes)


def _choice_overlaps(runs: Mapping[str, Sequence[Run]]) -> list[Verdict]:
    sets = {
        label: [selected_neurons.as_set(selected_neurons.list_selected(run)) for run in runs[label]]
        for label in (CHANGED, MOVIES, TWEETS)
    }
    sizes = selected_neurons.sizes(runs[CHANGED][0])
    pool = sizes.total()
    seeds = [run.seed for run in runs[CHANGED]]

    def overlap_with_next(one: str, two: str) -> BySeed:
        following = [*sets[two][1:], sets[two][0]]
        pairs = zip(seeds, sets[one], following, strict=True)
        return {seed: selected_neurons.common(first, second, pool)["overlap"] for seed, first, second in pairs}

    own = sets[CHANGED]
    chance = {
        seed: selected_neurons.compute_expected_overlap(first, second, sizes)
        for seed, first, second in zip(seeds, own, [*own[1:], own[0]], strict=True)
    }
    return [
        STABLE.judge(overlap_with_next(CHANGED, CHANGED), chance),
        TASK.judge(overlap_with_next(MOVIES, MOVIES), overlap_with_next(MOVIES, TWEETS)),
    ]


def _mean_shifts(runs: Sequence[Run]) -> BySeed:
    """Compute the mean absolute shift of a neuron's utilization rank, as a fraction of the ranks of its projection."""
    found = {}
    for run in runs:
        shifts = neuron_utilization.shifts(run.table, selected_neurons.trained(run))
        sizes = shifts.groupby("role")["rank_1"].transform("size")
        found[run.seed] = float((shifts["d_rank"].abs() / sizes).mean())
    return found


def table(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Tabulate test accuracy in points, trained fraction of the parameters, and seconds including the tuning phase."""
    rows = []
    for label in (FULL, LOW, *_trained_arms(runs)):
        points = t_interval(100 * np.array(list(accuracy(runs[label]).values()))).format(1)
        seconds = np.mean([run.meta.total_seconds for run in runs[label]])
        rows.append(
            {"": label, "accuracy": points, "trained": _trained_fraction(runs[label]), "seconds": f"{seconds:.0f}"}
        )
    return pd.DataFrame(rows)


def _trained_arms(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return the labels of NeFT's arms with a full training, not only a choice of neurons."""
    return [label for label in (CHANGED, REVERSED, RANDOM, PROBED) if label in runs]


def _trained_fraction(runs: Sequence[Run]) -> str:
    counted = runs[0].meta.parameters
    return f"{counted.trained / (counted.total or 1):.1%}"


PROBE = register(
    Probe(
        name="neft",
        title="NeFT: choice of the trained neurons",
        source="Xu et al., NeFT, arXiv 2403.11621",
        question="Do the neurons that rotate most in full fine-tuning outperform others, and are they task-specific?",
        quick_budget=105,
        arms=arms,
        judge=judge,
        former_labels={
            "NeFT, 9 %": CHANGED,  # prose: ok
            "NeFT, 9 %, reversed": REVERSED,
            "NeFT, 9 %, random": RANDOM,
            "NeFT, 9 %, probed": PROBED,
            "NeFT, choice alone, movies": MOVIES,  # prose: ok
            "NeFT, choice alone, tweets": TWEETS,  # prose: ok
        },
    )
)
