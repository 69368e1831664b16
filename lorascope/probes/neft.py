"""NeFT: do the neurons that full fine-tuning turns most do better than others, and are they those of the task?

Source: NeFT (arXiv 2403.11621), section 5.2 and table 2 (quality), section 5.4 and table 6 (overlap), figure 3
(reversed selection), figure 4 (utilisation), section 3 and table 1 (choice by probing).

Departs: a small encoder and two domains of one data set in place of LLaMA-2 and translation. The rates are those of
full fine-tuning here, as the authors take one rate for both. Neurons are chosen after a third of the steps: after a
quarter the authors find choices as good. Their "reversed" adds the other end to 3 %; here it stands alone. Random
neurons of the same number, and overlap of lots with the same number in every layer, are controls of ours.
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
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim, Verdict
from lorascope.probes.lora import FULL, LOW
from lorascope.probes.rank_statistics import NEXT_SEED, BySeed, accuracy
from lorascope.runs.run import Run

CHANGED, REVERSED, RANDOM = "NeFT, 9 %", "NeFT, 9 %, reversed", "NeFT, 9 %, random"
PROBED = "NeFT, 9 %, probed"
MOVIES, TWEETS = "NeFT, choice alone, movies", "NeFT, choice alone, tweets"

OVER_FULL = Claim(
    sentence="NeFT does better than full fine-tuning.",
    statistic="test accuracy of NeFT, 9 % of the parameters",
    control="test accuracy of full fine-tuning at the same steps",
    margin=0.002,
    source="section 5.2, table 2",
)
OVER_LORA = Claim(
    sentence="NeFT does better than LoRA.",
    statistic="test accuracy of NeFT, 9 % of the parameters",
    control="test accuracy of LoRA, rank 8 on all linear layers, at the same steps",
    margin=0.002,
    source="section 5.2, table 2",
)
OVER_RANDOM = Claim(
    sentence="The neurons that turn most do better than as many others.",
    statistic="test accuracy of NeFT",
    control="the same with neurons drawn by lot",
    margin=0.002,
    source="section 4.2",
)
OVER_REVERSED = Claim(
    sentence="The neurons that turn most do better than those that turn least.",
    statistic="test accuracy of NeFT",
    control="the same with as many neurons from the other end",
    margin=0.002,
    source="figure 3",
)
BY_PROBES = Claim(
    sentence="The neurons that are most like what linear probes read do better than as many others.",
    statistic="test accuracy of NeFT with neurons chosen by probing",
    control="the same with neurons drawn by lot",
    margin=0.002,
    source="section 3, table 1",
)
STABLE = Claim(
    sentence="Another seed chooses the same neurons, beyond the same layers.",
    statistic="overlap of the choices of two seeds",
    control="that of lots with as many neurons in every module",
    margin=0.05,
    source="section 5.4, table 6",
)
TASK = Claim(
    sentence="The neurons are those of the task.",
    statistic="overlap of the choices of two seeds on movies",
    control="overlap of a choice on movies with one on tweets, of another seed as well",
    margin=0.05,
    source="section 5.4",
)
PERTURBED = Claim(
    sentence="The neurons that turn least disturb how neurons are used more than those that turn most.",
    statistic="mean shift of the neurons' ranks by utilisation, as a share of the ranks, reversed",
    control="the same under NeFT",
    margin=0.01,
    source="section 6.2, figure 4",
)


def arms(quick: bool) -> list[Arm]:
    """NeFT and its two controls, in the full form also by probing, and the choice alone on two domains.

    Full fine-tuning and LoRA are those of another probe.
    """
    settings = encoder_settings(quick) | ({"steps": 12, "eval_every": 0, "test_size": 200} if quick else {})
    steps = settings["steps"]
    settings["observe"] = [*settings["observe"][:1], observe.utilization(every=steps)]
    shared: dict[str, Any] = {"parameter_share": 0.09, "lr": 1e-4, "head_lr": 1e-4, "tune_steps": steps // 3}
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
    """Accuracy against the baselines and controls, overlaps of choices, and shifts of ranks."""
    reached = {label: accuracy(runs[label]) for label in (FULL, LOW, *_trained_arms(runs))}
    verdicts = [
        claim.judge(reached[CHANGED], reached[control])
        for claim, control in ((OVER_FULL, FULL), (OVER_LORA, LOW), (OVER_RANDOM, RANDOM), (OVER_REVERSED, REVERSED))
    ]
    verdicts += [BY_PROBES.judge(reached[PROBED], reached[RANDOM])] if PROBED in runs else []
    verdicts += _choice_overlaps(runs) if len(runs[CHANGED]) > 1 else []
    verdicts.append(PERTURBED.judge(_shifts(runs[REVERSED]), _shifts(runs[CHANGED])))
    neft = {label: runs[label] for label in _trained_arms(runs)}
    choices = {"all": runs[CHANGED], "movies": runs[MOVIES], "tweets": runs[TWEETS]}
    exhibits = [
        exhibit("neurons", plots.neurons(neft)),
        exhibit("neuron_cosine", plots.neuron_cosine({CHANGED: runs[CHANGED]})),
        exhibit("neuron_overlap", plots.neuron_overlap(choices)),
        exhibit("rank_shift", plots.rank_shift(neft)),
        exhibit("training_curves", plots.training_curves({FULL: runs[FULL], LOW: runs[LOW], **neft})),
    ]
    notes = [
        "Held fixed: model, text, splits, batch size, number of steps. Seeds vary head, data order, dropout, and lots.",
        "NeFT's full fine-tuning before the choice is no part of its steps, but of its time. LoRA of rank 8 trains "
        f"{_trained_fraction(runs[LOW])} of the parameters, NeFT {_trained_fraction(runs[CHANGED])}.",
        NEXT_SEED,
        "A quick run trains NeFT for fewer steps than its baselines, and leaves out the choice by probing.",
    ]
    return Findings(verdicts, exhibits, {"NeFT": table(runs)}, notes)


def _choice_overlaps(runs: Mapping[str, Sequence[Run]]) -> list[Verdict]:
    sets = {
        label: [selected_neurons.as_set(selected_neurons.list_selected(run)) for run in runs[label]]
        for label in (CHANGED, MOVIES, TWEETS)
    }
    pool, sizes = selected_neurons.pool(runs[CHANGED][0]), selected_neurons.sizes(runs[CHANGED][0])
    seeds = [run.meta["seed"] for run in runs[CHANGED]]

    def with_next(one: str, two: str) -> BySeed:
        following = [*sets[two][1:], sets[two][0]]
        pairs = zip(seeds, sets[one], following, strict=True)
        return {seed: selected_neurons.common(first, second, pool)["overlap"] for seed, first, second in pairs}

    own = sets[CHANGED]
    lots = {
        seed: selected_neurons.compute_expected_overlap(first, second, sizes)
        for seed, first, second in zip(seeds, own, [*own[1:], own[0]], strict=True)
    }
    return [
        STABLE.judge(with_next(CHANGED, CHANGED), lots),
        TASK.judge(with_next(MOVIES, MOVIES), with_next(MOVIES, TWEETS)),
    ]


def _shifts(runs: Sequence[Run]) -> BySeed:
    """Mean shift of a neuron's rank from before to after training, as a share of the ranks of its projection."""
    found = {}
    for run in runs:
        shifts = neuron_utilization.shifts(run.table, selected_neurons.trained(run))
        sizes = shifts.groupby("role")["rank_1"].transform("size")
        found[run.meta["seed"]] = float((shifts["d_rank"].abs() / sizes).mean())
    return found


def table(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Test accuracy in points, trained share of the parameters, and seconds, the tuning's among them."""
    rows = []
    for label in (FULL, LOW, *_trained_arms(runs)):
        points = t_interval(100 * np.array(list(accuracy(runs[label]).values()))).format(1)
        seconds = np.mean([run.meta["total_seconds"] for run in runs[label]])
        rows.append(
            {"": label, "accuracy": points, "trained": _trained_fraction(runs[label]), "seconds": f"{seconds:.0f}"}
        )
    return pd.DataFrame(rows)


def _trained_arms(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """The arms of NeFT that train, not only choose."""
    return [label for label in (CHANGED, REVERSED, RANDOM, PROBED) if label in runs]


def _trained_fraction(runs: Sequence[Run]) -> str:
    counted = runs[0].meta["parameters"]
    return f"{counted['trained'] / counted['total']:.1%}"


PROBE = register(
    Probe(
        name="neft",
        title="NeFT: which neurons to train",
        source="Xu et al., NeFT, arXiv 2403.11621",
        question="Do the neurons that full fine-tuning turns most do better than others, and are they the task's?",
        quick_budget=105,
        arms=arms,
        judge=judge,
    )
)
