"""LoRA: low-rank compared with full-rank updates.

Does LoRA of rank 4 cost nothing against full fine-tuning where the update of a teacher has rank 2, and more where it
has rank 24? On text, LoRA of rank 8 is compared with full fine-tuning of a small encoder.

Source: LoRA (arXiv 2106.09685), section 4 with table 6 (rank), table 2 (quality).

Departs:

- Much smaller tasks and models.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from lorascope.papers.arms import Arm
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.statistics import Accuracy
from lorascope.papers.judging.study_statistics import Comparison, pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import planted_arms

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.inputs.tasks import Task

FULL, LOW, HIGH = "full fine-tuning", "LoRA, rank 8", "LoRA, rank 64"


PLANTED = (truth_names.RANK_2, truth_names.RANK_24)
"""Truths of LoRA's pair: its rank suffices where the update has rank 2, and not where it has rank 24."""
_EVERYWHERE: Any = {"targets": "all-linear"}


TEXT_LORA, TEXT_FULL = "LoRA, rank 8, sentiment", "full fine-tuning, sentiment"
SHORT = f"{TEXT_LORA}, 100 steps"
MORE_TEST_ROWS = 5000
"""Number of training rows that become test rows: a run of 300 steps reads 4,800 of the 8,316 that remain."""


def study_arms() -> list[Arm]:
    """Return the arms of LoRA's pair, whose alpha is four times the rank, and those on text."""
    from lorascope.methods import Full, LoRA

    students = {f"LoRA, rank {rank}": LoRA(rank=rank, alpha=4.0 * rank, **_EVERYWHERE) for rank in (1, 4, 16)}
    arms = planted_arms(students | {FULL: Full()}, PLANTED)
    # Rank 1 is known to be worse only where the update has a high rank.
    arms = [arm for arm in arms if arm.label != f"LoRA, rank 1, {truth_names.RANK_2}"]
    settings: dict[str, Any] = {"steps": 300, "batch_size": 16, "eval_every": 0, "eval_size": 1968, "observe": []}
    on_text = Arm(label=TEXT_FULL, method=Full(), settings=settings, vary=_with_large_test)
    lora = replace(on_text, label=TEXT_LORA, method=LoRA(rank=8, alpha=8.0, **_EVERYWHERE))
    return [*arms, on_text, lora, replace(lora, label=SHORT, settings=settings | {"steps": 100})]


def _with_large_test(arm: Arm, seed: int) -> Arm:
    return replace(arm, task=_large_test())


@cache
def _large_test() -> Task:
    from lorascope.inputs import tasks
    from lorascope.inputs.task_parts import enlarge_test

    return enlarge_test(tasks.load("sentiment"), MORE_TEST_ROWS)


JUDGED = {
    "pair.lora": pair("LoRA, rank 4", FULL, "LoRA, rank 1", truths=PLANTED, positive_truth=truth_names.RANK_24),
    "text.lora": Comparison(Accuracy(TEXT_LORA) - Accuracy(TEXT_FULL), positive=Accuracy(SHORT) - Accuracy(TEXT_FULL)),
}


PAPER = PaperStudy(
    name="LoRA",
    authors="Hu et al.",
    question="Does LoRA cost nothing against full fine-tuning where the update has low rank, and more where it "
    "has not?",
)
run = PAPER.run
