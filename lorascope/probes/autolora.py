"""Probe of AutoLoRA: variation of learned ranks between layers and between tasks, compared with noise.

A threshold at the mean turns any logits, including random ones, into ranks that differ between layers. With k = 8
components, it keeps 4 on average for small random logits and 2.9 for standard normal ones. The controls are therefore
random logits and a second seed.

Source: AutoLoRA (arXiv 2403.09113), section 5.4 and figure 3 (ranks differ between layers, projections and tasks),
section 5.2 (accuracy).

Departs:

- A small encoder.
- Two tasks on the same sentences, sentiment and domain, instead of different datasets.
- A shorter search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lorascope.evidence.statistics import autolora as statistics
from lorascope.evidence.statistics.ranks import RANKS
from lorascope.inputs import models
from lorascope.methods import AutoLoRA, LoRA
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.probes.base import Arm, Probe, encoder_settings
from lorascope.probes.rank_allocators import keep_ranks
from lorascope.runs.run import Run
from lorascope.schema import module_table


def arms() -> list[Arm]:
    """Return the registered arms: AutoLoRA, its search on the domains, and LoRA of rank 4 and of random ranks."""
    method = AutoLoRA(rank=8, alpha=16.0, selection_lr=1e-2, search_steps=100)
    lora, settings = LoRA(rank=4, alpha=16.0), encoder_settings()
    return [
        Arm(label=statistics.ADAPTED, method=method, settings=settings),
        # Its ranks come from the search, so one step of retraining is enough.
        Arm(label=statistics.DOMAINS, method=method, settings=encoder_settings(1), task="sentiment/domains"),
        Arm(label=statistics.UNIFORM, method=lora, settings=settings),
        Arm(label=statistics.RANDOM, method=lora, settings=settings, vary=_with_random_ranks),
    ]


def _with_random_ranks(arm: Arm, seed: int) -> Arm:
    """Return the arm with the ranks that small random logits give: on average half of 8 components."""
    names = module_table.match(module_table.describe(models.load("minilm")), ("q", "v"))
    logits = np.random.default_rng(seed).standard_normal((len(names), 8))
    # The softmax of small logits is at least its mean where they are.
    kept = (logits >= logits.mean(axis=1, keepdims=True)).sum(axis=1).tolist()
    method: Any = arm.method
    return replace(arm, method=replace(method, rank=dict(zip(names, kept, strict=True))))


def figures(runs: Mapping[str, Run]) -> list[ReportFigure]:
    """Draw the allocation, and the search."""
    label, run = statistics.ADAPTED, runs[statistics.ADAPTED]
    return [draw("rank_allocation", {label: run}), draw("importance", {label: run.parents[0]}, quantity="alpha")]


PROBE = Probe(
    name="autolora",
    title="AutoLoRA: learned ranks compared with noise",
    source="Zhang et al., AutoLoRA, arXiv 2403.09113",
    question="Do ranks differ between layers more than random ones do, and between tasks more than between seeds?",
    arms=arms,
    keep={(RANKS, label): keep_ranks for label in (statistics.ADAPTED, statistics.DOMAINS)},
    figures=figures,
    notes=(
        "AutoLoRA has no rank budget: its total rank is a result. Even random logits keep about half of the initial "
        "rank if they are small, and less if they are large.",
    ),
)
