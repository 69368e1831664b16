"""LoRA: is it on par with full fine-tuning, and do runs of different rank find the same directions?

Source: LoRA (arXiv 2106.09685), section 5 (quality), section 7.2 with figures 3 and 4 (subspace similarity).

Departs: the paper's tasks and models are far larger, and its figure 3 shares one initialisation between ranks or not
without saying; here the two runs of a pair never share a seed, since the rows of a smaller random A are also the first
rows of a larger one of the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis.seed_intervals import t_interval
from lorascope.inputs import tasks
from lorascope.methods import Full, LoRA
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim
from lorascope.probes.tfidf_baseline import tfidf_accuracy
from lorascope.runs.run import Run
from lorascope.updates.low_rank import phi

FULL, LOW, HIGH = "full fine-tuning", "LoRA, rank 8", "LoRA, rank 64"

PARITY = Claim(
    sentence="LoRA of rank 8 does as well as full fine-tuning, within two points.",
    statistic="test accuracy of LoRA, rank 8",
    control="test accuracy of full fine-tuning at the same steps, less two points",
    margin=0.001,
    source="section 5, table 2",
)
USEFUL = Claim(
    sentence="What LoRA reaches needs the network: word counts do not reach it.",
    statistic="test accuracy of LoRA, rank 8",
    control="test accuracy of TF-IDF with logistic regression on the same split",
    margin=0.02,
    source="yardstick of this project",
)
SHARED = Claim(
    sentence="The top direction of A is the same for a small and a large rank.",
    statistic="phi(1, 1) between A of rank 8 and A of rank 64 after training, mean over modules",
    control="the same before training: what two random A share by chance",
    margin=0.1,
    source="section 7.2, figure 3",
)


def arms(quick: bool) -> list[Arm]:
    """Full fine-tuning and LoRA of two ranks, the same steps each."""
    settings = encoder_settings(quick)
    lora: dict[str, Any] = {"targets": "all-linear", "lr": 1e-3, "head_lr": 1e-3}
    return [
        Arm(label=FULL, method=Full(lr=1e-4, head_lr=1e-4), settings=settings),
        Arm(label=LOW, method=LoRA(rank=8, alpha=8.0, **lora), settings=settings),
        Arm(label=HIGH, method=LoRA(rank=64, alpha=64.0, **lora), settings=settings),
    ]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Accuracy against full fine-tuning and word counts, and phi against chance."""
    accuracy = {label: {run.meta["seed"]: run.meta["test"]["metric"] for run in found} for label, found in runs.items()}
    words = tfidf_accuracy(tasks.load(runs[LOW][0].meta["task"]))
    verdicts = [
        PARITY.judge(accuracy[LOW], {seed: value - 0.02 for seed, value in accuracy[FULL].items()}),
        USEFUL.judge(accuracy[LOW], dict.fromkeys(accuracy[LOW], words["all"])),
    ]
    pairs = neighbours(runs[LOW], runs[HIGH])
    notes = [
        "Held fixed: model, text, splits, batch size, number of steps. Seeds vary head, adapters, data order, dropout.",
        "The yardstick has no seed: its accuracy stands as control for each of them.",
    ]
    if pairs:
        last = {low.meta["seed"]: mean_phi(low, high, None) for low, high in pairs}
        first = {low.meta["seed"]: mean_phi(low, high, 0) for low, high in pairs}
        verdicts.append(SHARED.judge(last, first))
    else:
        notes.append(f"{SHARED.sentence} Not judged: it needs two seeds, so that no pair shares its initial A.")
    exhibits = [
        exhibit("update_norm", plots.update_norm(dict(runs))),
        exhibit("update_norm_heat", plots.update_norm_heat({FULL: runs[FULL], LOW: runs[LOW]})),
        exhibit("norm_over_steps", plots.norm_over_steps(dict(runs))),
        exhibit("training_curves", plots.training_curves(dict(runs))),
        exhibit("spectrum", plots.spectrum({LOW: runs[LOW], HIGH: runs[HIGH]})),
    ]
    if pairs:
        low, high = pairs[0]
        exhibits.append(exhibit("subspace_similarity", plots.subspace_similarity({LOW: low, HIGH: high})))
        exhibits.append(exhibit("subspace_similarity", plots.subspace_similarity(list(runs[HIGH][:2]))))
    return Findings(verdicts, exhibits, {"Test accuracy": accuracy_table(runs, words)}, notes)


def neighbours(low: Sequence[Run], high: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pairs of runs that share no seed: each run with the next seed of the other arm."""
    if len(low) < 2:
        return []
    return list(zip(low, [*high[1:], high[0]], strict=True))


def mean_phi(low: Run, high: Run, step: int | None) -> float:
    """phi(1, 1) between the A of two runs at a step, mean over the modules of both."""
    first, second = low.factors(step), high.factors(step)
    return float(np.mean([phi(first[name]["A"], second[name]["A"], 1, 1) for name in first if name in second]))


def accuracy_table(runs: Mapping[str, Sequence[Run]], words: Mapping[str, float]) -> pd.DataFrame:
    """Test accuracy by arm and group in points, with half the interval over seeds, beside the yardstick's."""
    rows = [{"": "TF-IDF, logistic regression"} | {group: f"{100 * value:.1f}" for group, value in words.items()}]
    for label, found in runs.items():
        values = {"all": [run.meta["test"]["metric"] for run in found]}
        for group in found[0].meta["test"]["groups"]:
            values[group] = [run.meta["test"]["groups"][group] for run in found]
        rows.append({"": label} | {group: _accuracy_points(per_seed) for group, per_seed in values.items()})
    return pd.DataFrame(rows)


def _accuracy_points(values: Sequence[float]) -> str:
    return t_interval(100 * np.asarray(values, np.float64)).format(1)


PROBE = register(
    Probe(
        name="lora",
        title="LoRA: low rank against full rank",
        source="Hu et al., LoRA, arXiv 2106.09685",
        question="Does an update of rank 8 do what an update of full rank does, and does a larger rank find the same?",
        quick_budget=75,
        arms=arms,
        judge=judge,
    )
)
