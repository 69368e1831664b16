"""Probe of LoRA: accuracy compared with full fine-tuning, and similarity of subspaces between ranks.

Source: LoRA (arXiv 2106.09685), section 5 (quality), section 7.2 with figures 3 and 4 (subspace similarity).

Departs:

- Much smaller tasks and models.
- The two runs of a pair never share a seed. With the same seed, a smaller random A equals the first rows of a larger
  one. The paper does not state whether the ranks of its figure 3 share an initialization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd

from lorascope.adapters.host_weights import host_weight, to_array
from lorascope.evidence.statistics import lora as statistics
from lorascope.inputs import models, tasks
from lorascope.inputs.task_parts import subsample
from lorascope.methods import Full, LoRA
from lorascope.probes.base import (
    HELD_FIXED,
    Arm,
    OwnArm,
    Probe,
    ReportFigure,
    draw,
    encoder_settings,
    format_mean,
    registered_factors,
    registered_settings,
    select,
)
from lorascope.probes.seed_statistics import EachRun, NextSeed, Runs, accuracy, pair_next_seeds
from lorascope.probes.tfidf_baseline import tfidf_accuracy, tfidf_arm
from lorascope.runs.run import Run
from lorascope.updates import phi
from lorascope.updates.linalg import as_float64

FULL, LOW, HIGH = "full fine-tuning", "LoRA, rank 8", "LoRA, rank 64"


def arms(quick: bool) -> list[Arm]:
    """Return the arms: full fine-tuning and LoRA of two ranks, with the same number of steps."""
    settings = encoder_settings(quick)
    lora: dict[str, Any] = {"targets": "all-linear", "lr": 1e-3, "head_lr": 1e-3}
    return [
        Arm(label=FULL, method=Full(lr=1e-4, head_lr=1e-4), settings=settings),
        Arm(label=LOW, method=LoRA(rank=8, alpha=8.0, **lora), settings=settings),
        Arm(label=HIGH, method=LoRA(rank=64, alpha=64.0, **lora), settings=settings),
    ]


def registered() -> list[Arm | OwnArm]:
    """Return the registered arms: full fine-tuning and LoRA, both also on 100 drawn examples, and word counts."""
    few = registered_settings(150)
    low = LoRA(rank=8, alpha=8.0, targets="all-linear")
    high = LoRA(rank=64, alpha=64.0, targets="all-linear")
    return [
        Arm(label=FULL, method=Full(), settings=registered_settings()),
        Arm(label=LOW, method=low, settings=registered_factors()),
        Arm(label=HIGH, method=high, settings=registered_factors()),
        Arm(label=statistics.FEW_FULL, method=Full(), settings=few, vary=_with_few_examples),
        Arm(label=statistics.FEW_LOW, method=low, settings=few, vary=_with_few_examples),
        tfidf_arm(statistics.WORDS, "sentiment"),
    ]


def _with_few_examples(arm: Arm, seed: int) -> Arm:
    return replace(arm, task=subsample(tasks.load("sentiment"), 100, seed))


def shared_arms(quick: bool, *labels: str) -> list[Arm]:
    """Return the arms with these labels, which other probes use as well."""
    return [arm for arm in arms(quick) if arm.label in labels]


@cache
def tfidf_words(task: str) -> dict[str, float]:
    """Return the test accuracy of the TF-IDF baseline on a task: all examples, and each group."""
    return tfidf_accuracy(tasks.load(task))


def mean_phi(low: Run, high: Run, step: int | None) -> float:
    """Compute phi(1, 1) between the A's of two runs at a step (None: the end), mean over their common modules."""
    first, second = low.factors(step), high.factors(step)
    return float(np.mean([phi(first[name]["A"], second[name]["A"], 1, 1) for name in first if name in second]))


def keep_directions(run: Run) -> pd.DataFrame:
    """Return the kept table ``directions``; see ``evidence.statistics.lora``."""
    parts = []
    for when, step in (("start", 0), ("end", None)):
        for module, factors in run.factors(step).items():
            first = np.linalg.svd(as_float64(factors["A"]), full_matrices=False)[2][0]
            index = np.arange(len(first), dtype=np.uint16)
            parts.append(
                pd.DataFrame({"module": module, "when": when, "index": index, "value": first.astype(np.float16)})
            )
    return pd.concat(parts, ignore_index=True)


def keep_amplification(run: Run) -> pd.DataFrame:
    """Return the kept table ``amplification``; see ``evidence.statistics.lora``.

    The norm between k left and k right random directions is the root mean square over all directions,
    ``k |W| / sqrt(out * in)``, which is exact.
    """
    model, rows = models.load(run.meta.model), []
    for module, update in run.updates().items():
        weight = as_float64(to_array(host_weight(model.get_submodule(module))))
        left, sigma, right = update.svd()
        between, whole = np.linalg.norm(left.T @ weight @ right), np.linalg.norm(weight)
        rows.append((module, between, len(sigma) * whole / np.sqrt(weight.size)))
    return pd.DataFrame(rows, columns=["module", "update", "random"])


def figures(runs: Runs) -> list[ReportFigure]:
    """Draw norms, training curves and spectra of the arms, and the similarity of subspaces if there are two seeds."""
    shown = [
        draw("update_norm", dict(runs)),
        draw("update_norm_heat", select(runs, FULL, LOW)),
        draw("norm_over_steps", dict(runs)),
        draw("training_curves", dict(runs)),
        draw("spectrum", select(runs, LOW, HIGH)),
    ]
    for low, high in pair_next_seeds(runs[LOW], runs[HIGH])[:1]:
        shown.append(draw("subspace_similarity", {LOW: low, HIGH: high}))
        shown.append(draw("subspace_similarity", list(runs[HIGH][:2])))
    return shown


def accuracy_table(runs: Runs, words: Mapping[str, float]) -> pd.DataFrame:
    """Tabulate the test accuracy in points by arm and group: TF-IDF baseline, and mean ± half the 95% t-interval."""
    rows = [{"": "TF-IDF, logistic regression"} | {group: f"{100 * value:.1f}" for group, value in words.items()}]
    for label, found in runs.items():
        values = {"all": [run.score.metric for run in found]}
        values |= {group: [run.score.groups[group] for run in found] for group in found[0].score.groups}
        rows.append({"": label} | {group: format_mean((100 * one for one in of), 1) for group, of in values.items()})
    return pd.DataFrame(rows)


PROBE = Probe(
    name="lora",
    title="LoRA: low-rank compared with full-rank updates",
    source="Hu et al., LoRA, arXiv 2106.09685",
    question="Is LoRA of rank 8 as accurate as full fine-tuning, and does a larger rank learn the same subspace?",
    quick_budget=75,
    order=0,  # first, because other probes compare their methods with its arms
    arms=arms,
    registered=registered,
    keep={
        (statistics.DIRECTIONS, LOW): keep_directions,
        (statistics.DIRECTIONS, HIGH): keep_directions,
        (statistics.AMPLIFICATION, LOW): keep_amplification,
    },
    claims={
        "lora.parity": (EachRun(accuracy, LOW), EachRun(accuracy, FULL) - 0.02),
        "lora.words": (EachRun(accuracy, LOW), EachRun(lambda run: tfidf_words(run.task)["all"], LOW)),
        "lora.direction": (
            NextSeed(partial(mean_phi, step=None), LOW, HIGH),
            NextSeed(partial(mean_phi, step=0), LOW, HIGH),
        ),
    },
    figures=figures,
    tables=lambda runs: {"Test accuracy": accuracy_table(runs, tfidf_words(runs[LOW][0].task))},
    notes=lambda runs: [
        HELD_FIXED,
        "The TF-IDF baseline has no seed: its accuracy is the control for every seed.",
    ],
)
