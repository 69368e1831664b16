"""Probe of AdaLoRA: rank allocated to feed-forward modules and upper layers, agreement of seeds, and accuracy.

Source: AdaLoRA (arXiv 2303.10512), figure 3 and section 4.4 (rank allocation), table 1 (accuracy).

Departs:

- A small encoder instead of DeBERTaV3-base, and hundreds of training steps.

The authors' parameter counts allow less rank in feed-forward modules than the text of the paper states. The claim may
therefore fail in the paper's setting as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from lorascope.analysis import rank_allocations
from lorascope.evidence.statistics import adalora as statistics
from lorascope.evidence.statistics.ranks import RANKS
from lorascope.methods import AdaLoRA
from lorascope.probes.base import (
    HELD_FIXED,
    Arm,
    Probe,
    ReportFigure,
    draw,
    encoder_settings,
    registered_settings,
    select,
)
from lorascope.probes.lora import LOW, shared_arms
from lorascope.probes.rank_statistics import (
    FEED_FORWARD,
    NEXT_SEED,
    RankAgreement,
    RankFraction,
    final_ranks,
    keep_ranks,
)
from lorascope.probes.seed_statistics import EachRun, Runs, accuracy
from lorascope.runs.run import Run

ADAPTED = "AdaLoRA, from rank 12 to 8"


def arms(quick: bool) -> list[Arm]:
    """Return the arms: AdaLoRA on all linear layers, and LoRA with AdaLoRA's mean final rank."""
    method = AdaLoRA(init_rank=12, target_rank=8)
    adapted = Arm(label=ADAPTED, method=method, settings=encoder_settings(quick), cost=1.1)
    return [*shared_arms(quick, LOW), adapted]


def registered() -> list[Arm]:
    """Return the registered arms: AdaLoRA on sentiment and on its domains, and with rank 8 everywhere throughout."""
    adapted = AdaLoRA(init_rank=12, target_rank=8)
    # The scale is alpha / init_rank, the same for both.
    uniform = replace(adapted, init_rank=8, alpha=adapted.alpha * 8 / 12)
    settings = registered_settings()
    return [
        Arm(label=ADAPTED, method=adapted, settings=settings),
        Arm(label=statistics.DOMAINS, method=adapted, settings=settings, task="sentiment/domains"),
        Arm(label=statistics.UNIFORM, method=uniform, settings=settings),
    ]


def random_ranks(runs: Sequence[Run]) -> pd.DataFrame:
    """Draw random final ranks with the total of each run."""
    # AdaLoRA never exceeds its initial rank, so the random ranks have the same cap.
    return rank_allocations.random_ranks(final_ranks(runs), cap=runs[0].meta.method["init_rank"])


def figures(runs: Runs) -> list[ReportFigure]:
    """Draw the allocation, its history in the first run, and the training curves."""
    first = runs[ADAPTED][0]
    return [
        draw("rank_allocation", select(runs, ADAPTED), chance=True),
        draw("rank_replay", first),
        draw("importance", first),
        draw("training_curves", select(runs, ADAPTED, LOW)),
    ]


PROBE = Probe(
    name="adalora",
    title="AdaLoRA: rank allocation by importance",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512",
    question="Do feed-forward modules and upper layers get more rank for every seed, and does accuracy improve?",
    quick_budget=55,
    arms=arms,
    registered=registered,
    keep={(RANKS, label): keep_ranks for label in (ADAPTED, statistics.DOMAINS)},
    claims={
        "adalora.ffn": (RankFraction(ADAPTED, FEED_FORWARD), RankFraction(ADAPTED, FEED_FORWARD, random_ranks)),
        "adalora.top": (
            RankFraction(ADAPTED, ("top",), by="third"),
            RankFraction(ADAPTED, ("top",), random_ranks, by="third"),
        ),
        "adalora.stable": (RankAgreement(ADAPTED), RankAgreement(ADAPTED, random_ranks)),
        "adalora.better": (EachRun(accuracy, ADAPTED), EachRun(accuracy, LOW)),
    },
    figures=figures,
    notes=lambda runs: [HELD_FIXED, NEXT_SEED],
)
