"""AutoLoRA: learned ranks.

Does LoRA with AutoLoRA's ranks beat uniform ranks where modules need different ranks, and gain less where they do not?
AutoLoRA has no budget: its thresholds determine the total rank.

Source: AutoLoRA (arXiv 2403.09113), section 5.4 and figure 3 (ranks), section 5.2 with table 1 (accuracy).

Departs:

- A small decoder on planted teachers instead of RoBERTa-base.
- A shorter search.
"""

from __future__ import annotations

from lorascope.papers.arms import Arm
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import planted_arms
from lorascope.papers.rank_tables import (
    ALLOCATION,
    ORACLE,
    UNIFORM_STUDENT,
    allocation_tables,
)

SEARCHED = "AutoLoRA, from rank 4"


def study_arms() -> list[Arm]:
    """Return the arms of AutoLoRA's pair; its search is scored like its retraining."""
    from lorascope.methods import AutoLoRA

    method = AutoLoRA(rank=4, alpha=16.0, targets="all-linear", selection_lr=1e-2)
    return planted_arms({SEARCHED: method}, ALLOCATION)


JUDGED = {"pair.autolora": pair(SEARCHED, UNIFORM_STUDENT, ORACLE, truths=ALLOCATION)}
KEPT_TABLES = allocation_tables(SEARCHED)


PAPER = PaperStudy(
    name="AutoLoRA",
    authors="Zhang et al.",
    question="Do AutoLoRA's ranks beat uniform ones where modules need different ranks?",
)
run = PAPER.run
