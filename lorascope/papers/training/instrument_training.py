"""Training of the questions about the instruments: the open seeds of their registration, each kept once it is finished.

An arm without a number of judged seeds is in its pilot, which trains the tuning seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorascope.papers.instruments import QUESTIONS, SENTENCES, TEACHER
from lorascope.papers.judging import kept_study, registered_study, study_verification
from lorascope.papers.judging.code_hash import module_hash
from lorascope.papers.judging.kept_study import FIRST_SEED, StudyEvidence, StudyRun
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.study_rates import TUNING_SEEDS
from lorascope.papers.setups import planted_teacher, planted_truths
from lorascope.papers.training import sentence_measures, student_measures
from lorascope.papers.training.student_measures import Measured
from lorascope.papers.training.study_training import code_commit, machine


class MeasuredArm(NamedTuple):
    """Arm of the questions.

    Parameters
    ----------
    rate : float
        Learning rate.
    modules : tuple of str
        Names of the modules that define its text, training and measurements.
    measure : callable
        ``measure(seed, out)`` trains in the folder ``out`` and returns what was measured.
    """

    rate: float
    modules: tuple[str, ...]
    measure: Callable[[int, Path], Measured]


_STUDENT_MODULES = (student_measures.__name__, planted_truths.__name__, planted_teacher.__name__)
ARMS = {
    TEACHER: MeasuredArm(student_measures.STUDENT_METHOD.lr, _STUDENT_MODULES, student_measures.measure_students),
    SENTENCES: MeasuredArm(
        sentence_measures.SENTENCE_METHOD.lr, (sentence_measures.__name__,), sentence_measures.measure_sentences
    ),
}
"""Arms by label."""


class OpenSeed(NamedTuple):
    """Seed to train: label of its arm, seed, and "judged" or "tuning"."""

    arm: str
    seed: int
    role: str


def open_seeds(registration: StudyRegistration, evidence: StudyEvidence) -> list[OpenSeed]:
    """Return the seeds that the evidence lacks, all arms of a seed before the next one."""
    finished = set(zip(evidence.runs["arm"], evidence.runs["seed"], evidence.runs["role"], strict=True))
    seeds = []
    for label, arm in registration.arms.items():
        if arm.seeds:
            seeds += [OpenSeed(label, seed, "judged") for seed in range(FIRST_SEED, FIRST_SEED + arm.seeds)]
        else:
            seeds += [OpenSeed(label, seed, "tuning") for seed in TUNING_SEEDS]
    return sorted((seed for seed in seeds if seed not in finished), key=lambda open_seed: open_seed.seed)


def instrument_arm_hash(label: str) -> str:
    """Hash what the seeds of an arm have in common: the code of its text, settings and measurements."""
    arm = ARMS[label]
    text = json.dumps([label, arm.rate, *map(module_hash, arm.modules)])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def train_instruments(folder: Path, out: Path, registration_file: Path, minutes: float = math.inf) -> None:
    """Train and measure the open seeds one after another, and write everything that follows from the kept ones.

    Parameters
    ----------
    folder : path
        Folder of the kept seeds.
    out : path
        Folder of the run folders, which resume if they were interrupted.
    registration_file : path
        Registration, in the folder that contains ``folder``.
    minutes : float
        No seed starts after this many minutes.

    Raises
    ------
    ValueError
        An arm differs from the registered one.
    """
    torch.set_num_threads(1)  # numbers depend on the number of threads
    end = time.monotonic() + 60 * minutes
    registration = registered_study.read(registration_file)
    for label, arm in registration.arms.items():
        if (hash := instrument_arm_hash(label)) != arm.hash:
            raise ValueError(f"cannot train {label!r}: its hash must be {arm.hash}, as registered, got {hash}")
    for open_seed in open_seeds(registration, kept_study.read(folder)):
        if time.monotonic() >= end:
            break
        run = measure_seed(open_seed, out)
        kept_study.add_run(folder, run)
        print(f"{open_seed.arm}, seed {open_seed.seed}: {run.rows['cpu_seconds'].iloc[0]:.0f} CPU seconds", flush=True)
    kept_study.compact(folder)
    study_verification.write_study(folder, registration_file, QUESTIONS)


def measure_seed(open_seed: OpenSeed, out: Path) -> StudyRun:
    """Train one seed of an arm, and return what is kept of it."""
    label, seed, role = open_seed
    start = time.process_time()  # not wall-clock time, because other processes share the processor
    rows, losses, tables = ARMS[label].measure(seed, out)
    row: dict[str, Any] = {"arm": label, "arm_hash": instrument_arm_hash(label), "role": role, "seed": seed}
    row["rate"] = ARMS[label].rate
    row["run"] = f"{hashlib.sha256(label.encode()).hexdigest()[:12]}-{seed}-{role}"
    row |= machine() | {"commit": code_commit(), "cpu_seconds": time.process_time() - start}
    return StudyRun(rows.assign(**row), losses, tables)
