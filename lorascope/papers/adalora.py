"""AdaLoRA: rank allocation by importance.

Does AdaLoRA beat uniform ranks where modules need different ranks, and gain less where they do not? LoRA with the
planted ranks shows how much an allocation can gain.

Source: AdaLoRA (arXiv 2303.10512), section 4.4 with figure 3 (rank allocation), table 1 (accuracy).

Departs:

- A small decoder on planted teachers instead of DeBERTaV3-base, and hundreds of training steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorascope.papers.arms import Arm
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import Student, planted_arms
from lorascope.papers.rank_tables import (
    ALLOCATION,
    ORACLE,
    UNIFORM_STUDENT,
    allocation_tables,
)

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


PAPER = PaperStudy(
    name="AdaLoRA",
    authors="Zhang et al.",
    question="Do AdaLoRA's ranks beat uniform ones where modules need different ranks?",
)
run = PAPER.run
