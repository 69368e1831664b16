"""Pairs of planted teachers: arms that learn a truth that favors a method, and arms that learn one that does not.

A paper's file has the methods of its pair; see ``setups.planted_truths`` for the truths.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lorascope.papers.arms import Arm

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.methods.method import Method
    from lorascope.observe import Observer

STEPS = 400
"""Optimizer steps of a student, of 16 texts each."""


@dataclass(frozen=True)
class Student:
    """A student of planted teachers.

    Parameters
    ----------
    method : Method, or callable
        Method, or ``method(base, seed)`` where it depends on the seed; its learning rates are replaced.
    observers : sequence of Observer
        Further observers.
    after : int, optional
        Step after which the gap is recorded, in addition to the last one.
    single_task : int, optional
        Number of the only task of a mixture that it learns, from 0.
    """

    method: Method | Callable[[Any, int], Method]
    observers: Sequence[Observer] = ()
    after: int | None = None
    single_task: int | None = None


def planted_arms(students: Mapping[str, Student | Method], truths: Iterable[str], steps: int = STEPS) -> list[Arm]:
    """Return the arm of every student under every truth; the label names both, such as "LoRA, rank 2, planted ranks".

    Parameters
    ----------
    students : mapping label -> Student or Method
        Students, or methods that do not depend on the seed.
    truths : iterable of str
        Names of planted truths.
    steps : int
        Optimizer steps.
    """
    from lorascope.methods import Full
    from lorascope.papers.setups.planted_teacher import student as base
    from lorascope.papers.setups.planted_truths import TRUTHS

    arms = []
    for truth in truths:
        for label, student in students.items():
            if not isinstance(student, Student):
                student = Student(student)
            arms.append(
                Arm(
                    label=f"{label}, {truth}",
                    method=Full(),  # ``vary`` replaces it
                    # The observer of the gap scores the student, so the splits are hardly evaluated.
                    settings={"steps": steps, "batch_size": 16, "eval_every": 0, "eval_size": 16, "test_size": 16},
                    model=partial(base, TRUTHS[truth].blocks),
                    vary=partial(_arm_of_seed, student, truth),
                )
            )
    return arms


def _arm_of_seed(student: Student, truth: str, arm: Arm, seed: int) -> Arm:
    from lorascope.papers.setups import planted_truths

    method: Any = student.method
    # Entries, planted ranks and planted neurons depend on the seed.
    if callable(method):
        method = method(planted_truths.student(planted_truths.TRUTHS[truth].blocks), seed)
    gap = planted_truths.gap(truth=truth, seed=seed, after=student.after, single_task=student.single_task)
    return replace(
        arm,
        method=method,
        task=planted_truths.sampled_task(truth, seed, student.single_task),
        settings={**arm.settings, "observe": [gap, *student.observers]},
    )
