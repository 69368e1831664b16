"""ALoRA (Allocating LoRA): rank allocation by ablation.

Does ALoRA beat uniform ranks where modules need different ranks, and gain less where they do not?

Source: ALoRA (arXiv 2403.16187), figure 3 and section 4.5 (rank allocation), table 1 (accuracy).

Departs:

- A small decoder on planted teachers instead of LLaMA-2 7B.
- Rounds start after a fifth of the steps, because scores mean little before the student has learned.
"""

from __future__ import annotations

from lorascope.papers.arms import Arm
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import STEPS, Student, planted_arms
from lorascope.papers.rank_tables import (
    ALLOCATION,
    ORACLE,
    UNIFORM_STUDENT,
    allocation_tables,
)

MOVED = "ALoRA, rank 2"


def study_arms() -> list[Arm]:
    """Return the arms of ALoRA's pair; the gap is recorded before the first round, which must not be too early."""
    from lorascope.methods import ALoRA

    # After the default, a tenth of the steps, students at a high rate have closed less than 20 points.
    first_round = STEPS // 5
    method = ALoRA(init_rank=2, alpha=8.0, warm_steps=first_round)
    return planted_arms({MOVED: Student(method, after=first_round - 1)}, ALLOCATION)


JUDGED = {"pair.alora": pair(MOVED, UNIFORM_STUDENT, ORACLE, truths=ALLOCATION)}
KEPT_TABLES = allocation_tables(MOVED)


PAPER = PaperStudy(
    name="ALoRA",
    authors="Liu et al.",
    question="Do ALoRA's ranks beat uniform ones where modules need different ranks?",
)
run = PAPER.run
