"""AutoLoRA: learned ranks compared with noise.

Do learned ranks differ between layers and between tasks by more than noise, and do they improve accuracy? A threshold
at the mean turns any logits, including random ones, into ranks that differ between layers. With k = 8 components, it
keeps 4 on average for small random logits and 2.9 for standard normal ones. The controls are therefore random logits
and a second seed.

Source: AutoLoRA (arXiv 2403.09113), section 5.4 and figure 3 (ranks differ between layers, projections and tasks),
section 5.2 (accuracy).

Departs:

- A small encoder.
- Two tasks on the same sentences, sentiment and domain, instead of different datasets.
- A shorter search.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope.papers.judging.statistics import Accuracy, OfRun, Simulated, average
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import planted_arms
from lorascope.papers.probe import Arm, Probe, encoder_settings
from lorascope.papers.rank_tables import (
    ALLOCATION,
    ORACLE,
    RANKS,
    UNIFORM_STUDENT,
    allocation_tables,
    keep_ranks,
    rank_agreement,
)
from lorascope.schema import module_table

ADAPTED, DOMAINS = "AutoLoRA", "AutoLoRA, search only, domains"
UNIFORM, RANDOM = "LoRA, rank 4, q and v", "LoRA, ranks from random logits, q and v"


def arms() -> list[Arm]:
    """Return the registered arms of the AutoLoRA paper: its search, also on domains; LoRA of rank 4 or random ranks."""
    from lorascope.methods import AutoLoRA, LoRA

    method = AutoLoRA(rank=8, alpha=16.0, selection_lr=1e-2, search_steps=100)
    lora, settings = LoRA(rank=4, alpha=16.0), encoder_settings()
    return [
        Arm(label=ADAPTED, method=method, settings=settings),
        # Its ranks come from the search, so one step of retraining is enough.
        Arm(label=DOMAINS, method=method, settings=encoder_settings(1), task="sentiment/domains"),
        Arm(label=UNIFORM, method=lora, settings=settings),
        Arm(label=RANDOM, method=lora, settings=settings, vary=_with_random_ranks),
    ]


def _with_random_ranks(arm: Arm, seed: int) -> Arm:
    """Return the arm with the ranks that small random logits give: on average half of 8 components."""
    from lorascope.inputs import models

    names = module_table.match(module_table.describe(models.load("minilm")), ("q", "v"))
    logits = np.random.default_rng(seed).standard_normal((len(names), 8))
    # The softmax of small logits is at least its mean where they are.
    ranks = (logits >= logits.mean(axis=1, keepdims=True)).sum(axis=1).tolist()
    method: Any = arm.method
    return replace(arm, method=replace(method, rank=dict(zip(names, ranks, strict=True))))


SEARCHED = "AutoLoRA, from rank 4"


def study_arms() -> list[Arm]:
    """Return the arms of AutoLoRA's pair; its search is scored like its retraining."""
    from lorascope.methods import AutoLoRA

    method = AutoLoRA(rank=4, alpha=16.0, targets="all-linear", selection_lr=1e-2)
    return planted_arms({SEARCHED: method}, ALLOCATION)


JUDGED = {"pair.autolora": pair(SEARCHED, UNIFORM_STUDENT, ORACLE, truths=ALLOCATION)}
KEPT_TABLES = allocation_tables(SEARCHED)


def spread(table: pd.DataFrame) -> float:
    """Compute, for a claim on AutoLoRA, the standard deviation of the final ranks over modules."""
    return float(table["value"].std(ddof=1))


CLAIMS = {
    # Deviation over 12 modules that keep the components with at least the mean of 8 logits, which are small and normal.
    "autolora.spread": (OfRun(spread, RANKS, ADAPTED), Simulated(0.8316, draws=1_000_000, error=0.0002)),
    "autolora.tasks": (average([rank_agreement(ADAPTED), rank_agreement(DOMAINS)]), rank_agreement(ADAPTED, DOMAINS)),
    "autolora.better": (Accuracy(ADAPTED), Accuracy(UNIFORM)),
    "autolora.over_random": (Accuracy(ADAPTED), Accuracy(RANDOM)),
}


PROBE = Probe(
    name="autolora",
    title="AutoLoRA: learned ranks compared with noise",
    source="Zhang et al., AutoLoRA, arXiv 2403.09113",
    question="Do ranks differ between layers more than random ones do, and between tasks more than between seeds?",
    arms=arms,
    keep={(RANKS, label): keep_ranks for label in (ADAPTED, DOMAINS)},
)

PAPER = PaperStudy(
    name="AutoLoRA",
    authors="Zhang et al.",
    question="Do AutoLoRA's ranks beat uniform ones where modules need different ranks?",
)
run = PAPER.run
