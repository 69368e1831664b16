"""Probe of LoRA: accuracy compared with full fine-tuning, and similarity of subspaces between ranks.

Source: LoRA (arXiv 2106.09685), section 5 (quality), section 7.2 with figures 3 and 4 (subspace similarity).

Departs:

- Much smaller tasks and models.
- The two runs of a pair never share a seed. With the same seed, a smaller random A equals the first rows of a larger
  one. The paper does not state whether the ranks of its figure 3 share an initialization.
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
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, make_report_figure, register
from lorascope.probes.claims import Claim
from lorascope.probes.tfidf_baseline import tfidf_accuracy
from lorascope.runs.run import Run
from lorascope.updates import phi

FULL, LOW, HIGH = "full fine-tuning", "LoRA, rank 8", "LoRA, rank 64"

PARITY = Claim(
    sentence="LoRA of rank 8 is non-inferior to full fine-tuning (tolerance 2 points).",
    statistic="test accuracy of LoRA, rank 8",
    control="test accuracy of full fine-tuning after the same number of steps, minus 2 points",
    margin=0.001,
    source="section 5, table 2",
)
USEFUL = Claim(
    sentence="LoRA of rank 8 outperforms a TF-IDF baseline without a neural network.",
    statistic="test accuracy of LoRA, rank 8",
    control="test accuracy of logistic regression on TF-IDF features, same split",
    margin=0.02,
    source="baseline of this project",
)
SHARED = Claim(
    sentence="Training makes the top singular vectors of A similar for rank 8 and rank 64.",
    statistic="subspace similarity phi(1, 1) of A at rank 8 and A at rank 64 after training, mean over modules",
    control="the same before training, for two random A's",
    margin=0.1,
    source="section 7.2, figure 3",
)


def arms(quick: bool) -> list[Arm]:
    """Return the arms: full fine-tuning and LoRA of two ranks, with the same number of steps."""
    settings = encoder_settings(quick)
    lora: dict[str, Any] = {"targets": "all-linear", "lr": 1e-3, "head_lr": 1e-3}
    return [
        Arm(label=FULL, method=Full(lr=1e-4, head_lr=1e-4), settings=settings),
        Arm(label=LOW, method=LoRA(rank=8, alpha=8.0, **lora), settings=settings),
        Arm(label=HIGH, method=LoRA(rank=64, alpha=64.0, **lora), settings=settings),
    ]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Compare the accuracy with full fine-tuning and TF-IDF, and phi with its value before training."""
    accuracy = {label: {run.seed: run.score.metric for run in found} for label, found in runs.items()}
    words = tfidf_accuracy(tasks.load(runs[LOW][0].task))
    # The tolerance is subtracted from the control, so that non-inferiority is a positive effect.
    verdicts = [
        PARITY.judge(accuracy[LOW], {seed: value - 0.02 for seed, value in accuracy[FULL].items()}),
        USEFUL.judge(accuracy[LOW], dict.fromkeys(accuracy[LOW], words["all"])),
    ]
    pairs = pair_next_seeds(runs[LOW], runs[HIGH])
    notes = [
        "Held fixed: model, data, splits, batch size, number of steps. Seeds vary the classifier head, adapter "
        "initialization, data order and dropout.",
        "The TF-IDF baseline has no seed: its accuracy is the control for every seed.",
    ]
    if pairs:
        last = {low.seed: mean_phi(low, high, None) for low, high in pairs}
        first = {low.seed: mean_phi(low, high, 0) for low, high in pairs}
        verdicts.append(SHARED.judge(last, first))
    else:
        notes.append(
            f"Not judged: {SHARED.sentence!r} It needs two seeds, because the runs of a pair must not share a seed."
        )
    figures = [
        make_report_figure("update_norm", plots.update_norm(dict(runs))),
        make_report_figure("update_norm_heat", plots.update_norm_heat({FULL: runs[FULL], LOW: runs[LOW]})),
        make_report_figure("norm_over_steps", plots.norm_over_steps(dict(runs))),
        make_report_figure("training_curves", plots.training_curves(dict(runs))),
        make_report_figure("spectrum", plots.spectrum({LOW: runs[LOW], HIGH: runs[HIGH]})),
    ]
    if pairs:
        low, high = pairs[0]
        figures.append(make_report_figure("subspace_similarity", plots.subspace_similarity({LOW: low, HIGH: high})))
        figures.append(make_report_figure("subspace_similarity", plots.subspace_similarity(list(runs[HIGH][:2]))))
    return Findings(verdicts, figures, {"Test accuracy": accuracy_table(runs, words)}, notes)


def pair_next_seeds(low: Sequence[Run], high: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pair each run with the next seed's run of the other arm; the list is empty for a single seed."""
    if len(low) < 2:
        return []
    return list(zip(low, [*high[1:], high[0]], strict=True))


def mean_phi(low: Run, high: Run, step: int | None) -> float:
    """Compute phi(1, 1) between the A's of two runs at a step (None: the end), mean over their common modules."""
    first, second = low.factors(step), high.factors(step)
    return float(np.mean([phi(first[name]["A"], second[name]["A"], 1, 1) for name in first if name in second]))


def accuracy_table(runs: Mapping[str, Sequence[Run]], words: Mapping[str, float]) -> pd.DataFrame:
    """Tabulate the test accuracy in points by arm and group: TF-IDF baseline, and mean ± half the 95% t-interval."""
    rows = [{"": "TF-IDF, logistic regression"} | {group: f"{100 * value:.1f}" for group, value in words.items()}]
    for label, found in runs.items():
        values = {"all": [run.score.metric for run in found]}
        for group in found[0].score.groups:
            values[group] = [run.score.groups[group] for run in found]
        rows.append({"": label} | {group: _accuracy_points(per_seed) for group, per_seed in values.items()})
    return pd.DataFrame(rows)


def _accuracy_points(values: Sequence[float]) -> str:
    return t_interval(100 * np.asarray(values, np.float64)).format(1)


PROBE = register(
    Probe(
        name="lora",
        title="LoRA: low-rank compared with full-rank updates",
        source="Hu et al., LoRA, arXiv 2106.09685",
        question="Is LoRA of rank 8 as accurate as full fine-tuning, and does a larger rank learn the same subspace?",
        quick_budget=75,
        arms=arms,
        judge=judge,
    )
)
