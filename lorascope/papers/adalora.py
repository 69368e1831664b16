"""AdaLoRA: rank allocation by importance, and its motivation.

Do feed-forward modules and upper layers get more rank, do seeds and tasks agree on it, and does accuracy improve? The
motivation is tested with LoRA on one weight type or one group of layers at a time, with exactly equal parameters.

Source: AdaLoRA (arXiv 2303.10512), figure 1 (motivation), figure 3 and section 4.4 (rank allocation), table 1
(accuracy).

Departs:

- A small encoder instead of DeBERTaV3-base, and hundreds of training steps.
- Three groups of two layers; the paper does not state its groups.

The authors' parameter counts allow less rank in feed-forward modules than the text of the paper states. The claim may
therefore fail in the paper's setting as well.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pandas as pd

from lorascope.analysis.baseline_ranks import equal_parameters
from lorascope.papers.judging.statistics import Accuracy, Constant, OfPairs, OfRun, average
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.lora import LOW
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import Student, planted_arms
from lorascope.papers.probe import Arm, Probe, encoder_settings
from lorascope.papers.rank_tables import (
    ALLOCATION,
    FEED_FORWARD,
    ORACLE,
    RANKS,
    UNIFORM_STUDENT,
    allocation_tables,
    keep_ranks,
    of_roles,
    rank_agreement,
    residual_tau,
    top_fraction,
)
from lorascope.schema import module_table

ADAPTED = "AdaLoRA, from rank 12 to 8"
DOMAINS, UNIFORM = f"{ADAPTED}, domains", "AdaLoRA, from rank 8 to 8"
FREE, RAW = f"{ADAPTED}, no penalty", f"{ADAPTED}, sensitivity only"
ATTENTION_TYPES, FEED_FORWARD_TYPES = ("W_q", "W_k", "W_v", "W_o"), ("W_f1", "W_f2")
BOTTOM, TOP = "layers 0, 1", "layers 4, 5"

# Only figures show these.
SMALLER = {1: "AdaLoRA, from rank 2 to 1", 2: "AdaLoRA, from rank 4 to 2", 4: "AdaLoRA, from rank 6 to 4"}


def arms() -> list[Arm]:
    """Return the registered arms of the AdaLoRA paper: on sentiment, on its domains, and with rank 8 throughout.

    Smaller budgets, and AdaLoRA without one of its parts, are for figures.
    """
    from lorascope.methods import AdaLoRA

    adapted = AdaLoRA(init_rank=12, target_rank=8)
    # The scale is alpha / init_rank, the same for all.
    uniform = replace(adapted, init_rank=8, alpha=adapted.alpha * 8 / 12)
    smaller = {}
    for (target, label), init in zip(SMALLER.items(), (2, 4, 6), strict=True):  # the paper's initial ranks
        smaller[label] = replace(adapted, init_rank=init, target_rank=target, alpha=adapted.alpha * init / 12)
    settings = encoder_settings()
    return [
        Arm(label=ADAPTED, method=adapted, settings=settings),
        Arm(label=DOMAINS, method=adapted, settings=settings, task="sentiment/domains"),
        Arm(label=UNIFORM, method=uniform, settings=settings),
        Arm(label=FREE, method=replace(adapted, gamma=0.0), settings=settings),
        Arm(label=RAW, method=replace(adapted, importance="sensitivity"), settings=settings),
        *(Arm(label=label, method=method, settings=settings) for label, method in smaller.items()),
    ]


ALLOCATED = "AdaLoRA, rank 4 to 2"


def study_arms() -> list[Arm]:
    """Return the arms of AdaLoRA's pair, and those with which all allocators are compared.

    AdaLoRA from rank 2 to 2 has its form and penalty, but no allocation; LoRA of rank 6 has more rank than it starts
    with.
    """
    from lorascope.methods import AdaLoRA, LoRA
    from lorascope.papers.setups.planted_truths import uneven_ranks

    everywhere: Any = {"targets": "all-linear"}
    allocated = AdaLoRA(init_rank=4, target_rank=2, alpha=64.0, **everywhere)
    students = {
        ALLOCATED: allocated,
        "AdaLoRA, rank 2 to 2": replace(allocated, init_rank=2, alpha=32.0),
        UNIFORM_STUDENT: LoRA(rank=2, alpha=8.0, **everywhere),
        "LoRA, rank 6": LoRA(rank=6, alpha=24.0, **everywhere),
    }
    # With one alpha, a component of a module with few has the larger scale, as in AutoLoRA's retraining.
    oracle = Student(lambda base, seed: LoRA(rank=uneven_ranks(base, seed), alpha=16.0))
    return planted_arms(students, ALLOCATION) + planted_arms({ORACLE: oracle}, ALLOCATION[:1])


JUDGED = {"pair.adalora": pair(ALLOCATED, UNIFORM_STUDENT, ORACLE, truths=ALLOCATION)}
KEPT_TABLES = allocation_tables(ALLOCATED)


TYPES = {"W_q": "q", "W_k": "k", "W_v": "v", "W_o": "o", "W_f1": "ffn_in", "W_f2": "ffn_out"}
MIDDLE = "layers 2, 3"
GROUPS = {BOTTOM: (0, 1), MIDDLE: (2, 3), TOP: (4, 5)}


@cache
def _minilm_modules() -> pd.DataFrame:
    from lorascope.inputs import models

    return module_table.describe(models.load("minilm"))


def targets() -> dict[str, tuple[str, ...]]:
    """Return the targets of arms on AdaLoRA's motivation: one role in all layers, or all six roles in two layers."""
    modules = _minilm_modules()
    linear = modules[modules["role"].isin(list(TYPES.values()))]
    by_type = {label: (role,) for label, role in TYPES.items()}
    return by_type | {label: tuple(linear["module"][linear["layer"].isin(group)]) for label, group in GROUPS.items()}


def placement_arms() -> list[Arm]:
    """Return the registered arms on AdaLoRA's motivation: LoRA on the eight targets of claims, of equal parameters."""
    from lorascope.methods import LoRA

    by_label = targets()
    ranks = equal_parameters(_minilm_modules(), by_label)
    del by_label[MIDDLE]  # which only decides the ranks
    return [
        Arm(
            label=label,
            method=LoRA(rank=ranks[label], alpha=float(ranks[label]), targets=modules),  # the same scale for all
            settings=encoder_settings(),
        )
        for label, modules in by_label.items()
    ]


# Feed-forward modules are two of six roles and the top third has two of six layers, so ranks that do not depend on the
# module give a third to either.
CLAIMS = {
    "placement.ffn": (average(map(Accuracy, FEED_FORWARD_TYPES)), average(map(Accuracy, ATTENTION_TYPES))),
    "placement.upper": (Accuracy(TOP), Accuracy(BOTTOM)),
    "adalora.ffn": (of_roles(ADAPTED, *FEED_FORWARD), Constant(1 / 3)),
    "adalora.top": (OfRun(top_fraction, RANKS, ADAPTED), Constant(1 / 3)),
    "adalora.stable": (rank_agreement(ADAPTED), Constant(0.0)),
    "adalora.beyond": (OfPairs(residual_tau, RANKS, ADAPTED, ADAPTED), Constant(0.0)),
    "adalora.task": (average([rank_agreement(ADAPTED), rank_agreement(DOMAINS)]), rank_agreement(ADAPTED, DOMAINS)),
    "adalora.better": (Accuracy(ADAPTED), Accuracy(LOW)),
    "adalora.allocation": (Accuracy(ADAPTED), Accuracy(UNIFORM)),
}


PROBE = Probe(
    name="adalora",
    title="AdaLoRA: rank allocation by importance",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512",
    question="Do feed-forward modules and upper layers get more rank for every seed, and does accuracy improve?",
    arms=arms,
    keep={(RANKS, label): keep_ranks for label in (ADAPTED, DOMAINS)},
)

PLACEMENT = Probe(
    name="placement",
    title="AdaLoRA's motivation: equal parameters in different modules",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512",
    question="Does accuracy depend on which weight type or which layers are adapted, at equal parameters?",
    arms=placement_arms,
)

PAPER = PaperStudy(
    name="AdaLoRA",
    authors="Zhang et al.",
    question="Do AdaLoRA's ranks beat uniform ones where modules need different ranks?",
)
run = PAPER.run
