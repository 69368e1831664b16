"""HydraLoRA: several experts with a shared A.

Does HydraLoRA beat LoRA of equal size where tasks need different updates, and gain less where they do not? Does one
shared A beat separate A's of equal size where tasks share A, and gain less where they do not? Its motivation
is tested in ``hydralora_factors``.

Source: HydraLoRA (arXiv 2404.19245), section 4.2 with table 2 (accuracy), section 4.3 with figure 6 (ablations).

Departs:

- A small decoder on four planted tasks instead of LLaMA2-7B on instruction datasets.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from lorascope.papers.arms import Arm
from lorascope.papers.hydralora_factors import MOTIVE
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.study_statistics import GapClosed, average, pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import Student, planted_arms
from lorascope.schema.module_roles import FFN

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.methods.method import Method


HETEROGENEITY = (truth_names.SHARED_A, truth_names.ONE_UPDATE)
"""Truths of HydraLoRA's pair: tasks need different updates, or the same one."""
SHARED = (truth_names.SHARED_A, truth_names.UNRELATED)
"""Truths of the pair on its shared A: tasks share A, or nothing."""
EXPERTS, EQUAL = "HydraLoRA, 4 experts of rank 4", "LoRA, rank 12"
SEPARATE = {rank: f"HydraLoRA, separate A's of rank {rank}" for rank in (3, 4, 6)}
SINGLE_TASKS = tuple(f"LoRA, rank 4, {truth_names.task_name(number)} only" for number in range(truth_names.TASKS))


def study_arms() -> list[Arm]:
    """Return the arms of HydraLoRA's pairs, with about equal parameters in method and control.

    A block has 5,376 parameters with HydraLoRA, 5,184 with LoRA of rank 12, and 5,952 with separate A's of rank 3. The
    LoRAs that learn a single task read as many texts as the mixture has.
    """
    from lorascope.methods import HydraLoRA, LoRA

    experts = HydraLoRA(rank=4, num_experts=4, alpha=16.0)
    lora = LoRA(rank=12, alpha=48.0, targets=FFN)
    separate: dict[str, Student | Method] = {
        label: replace(experts, shared_a=False, rank=rank, alpha=4.0 * rank) for rank, label in SEPARATE.items()
    }
    small = replace(lora, rank=4, alpha=16.0)
    task_by_task = {label: Student(small, single_task=number) for number, label in enumerate(SINGLE_TASKS)}
    return [
        *planted_arms({EXPERTS: experts}, dict.fromkeys(HETEROGENEITY + SHARED)),
        *planted_arms({EQUAL: lora, f"{EXPERTS}, uniform gates": replace(experts, router="uniform")}, HETEROGENEITY),
        *planted_arms(separate, SHARED),
        *planted_arms(task_by_task, HETEROGENEITY[:1]),
    ]


# Positive control: a LoRA per task, which shows that different updates help.
_BY_TASK = average(GapClosed(f"{label}, {HETEROGENEITY[0]}") for label in SINGLE_TASKS)
JUDGED = {
    "pair.hydralora": replace(
        pair(EXPERTS, EQUAL, truths=HETEROGENEITY), positive=_BY_TASK - GapClosed(f"{EQUAL}, {HETEROGENEITY[0]}")
    ),
    "pair.shared_a": pair(EXPERTS, SEPARATE[3], SEPARATE[6], truths=SHARED),
}


PAPER = PaperStudy(
    name="HydraLoRA",
    authors="Tian et al.",
    question="Are A's shared between tasks because of training, and does HydraLoRA beat LoRA where they are?",
    motive=MOTIVE,
)
run = PAPER.run
