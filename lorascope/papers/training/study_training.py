"""Training of the second edition: the open runs of its registration, each of which is kept as soon as it is finished.

The tuning runs of an arm choose its rate; its judged runs start when the registration has their number. Saved
parameters are deleted when every table that reads them is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from lorascope import __version__
from lorascope.experiments.sweep import Job, train_job
from lorascope.files.data_folder import DATA
from lorascope.inputs import models, tasks
from lorascope.inputs.classifier_head import fit_head, weights_hash
from lorascope.inputs.task_parts import identify_test_rows
from lorascope.inputs.tasks import Task
from lorascope.methods.method import Method, config
from lorascope.papers.arms import Arm, ComputedArm
from lorascope.papers.judging import kept_study
from lorascope.papers.judging.code_hash import module_hash
from lorascope.papers.judging.kept_study import FIRST_SEED, STUDY_COLUMNS, StudyEvidence, StudyRun
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.study_rates import TUNING_SEEDS, chosen_rates
from lorascope.papers.registry import COMPARISONS, KEPT_TABLES, study_arms
from lorascope.papers.setups.planted_truths import base_gaps, gap, task_name
from lorascope.runs.folders import RunLocked, lock_run
from lorascope.runs.run import Run
from lorascope.runs.writer import remove_states
from lorascope.training.processor import processor_name

_RATES = ("lr", "head_lr", "selection_lr")  # fields of methods that have the rate of the arm
_FREE_SETTINGS = ("observe", "seed", "eval_every", "test_size")  # they do not change how a run trains


@dataclass(frozen=True)
class StudyJob:
    """A run to train: label of its arm, seed, "judged" or "tuning", and its rate.

    ``changes`` are settings of ``train`` that differ from those of the arm, such as fewer steps, and no run with any
    is evidence.
    """

    arm: str
    seed: int
    role: str
    rate: float
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FinishedStudyRun(StudyRun):
    """Kept part of a run, and the trained runs by arm that it was computed from: itself, and the others of its sets."""

    trained: Mapping[str, Run] = field(default_factory=dict)


class RunScore(NamedTuple):
    """RunScore of a run after its last phase, averaged over tasks, and its unit."""

    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.value:.4g} {self.unit}"


def machine() -> dict[str, Any]:
    """Return the columns of kept runs that identify the machine: a run is equal if it is trained again on it."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": processor_name(), "capability": capability, "torch": str(torch.__version__), "threads": 1,
        "device": "cpu",
    }  # fmt: skip


@cache
def code_commit() -> str:
    """Return the commit of the code, or the version of the package without a git repository."""
    # The repository of this project, not one that contains the folder.
    command = ["git", f"--git-dir={DATA.parent / '.git'}", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return __version__


@cache
def arms_by_label() -> dict[str, Arm | ComputedArm]:
    """Return the arms of all papers by label.

    Raises
    ------
    ValueError
        Two arms have the same label.
    """
    by_label: dict[str, Arm | ComputedArm] = {}
    for arm in study_arms():
        if by_label.setdefault(arm.label, arm) is not arm:
            raise ValueError(f"labels must be unique, got two arms with label {arm.label!r}")
    return by_label


def study_arm_hash(label: str) -> str:
    """Hash what the runs of an arm have in common: method, settings, rules of task and teacher, and base weights.

    The first judged seed stands for all; rates are left out.
    """
    arm = arms_by_label()[label]
    if isinstance(arm, ComputedArm):
        content: dict[str, Any] = {"method": _without_rates(arm.method), "setup": module_hash(arm.setup)}
    else:
        arm = arm.of_seed(FIRST_SEED)
        # What is recorded does not change how a run trains, and the rate is chosen later.
        settings = {name: value for name, value in arm.settings.items() if name not in _FREE_SETTINGS}
        task, labels = _task(arm), None
        if task.classifies:
            labels = task.labels
        content = {
            "method": _without_rates(arm.method),
            "settings": settings,
            "base": _base_hash(arm.model, labels),
            "task": task.hash,
        }
        if (teacher := _teacher(arm)) is not None:
            # Another processor may sample another token, so the rule of the text stands for it.
            content["task"] = [teacher.truth, teacher.single_task, module_hash(gap.__module__)]
    return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"


def _without_rates(method: Method) -> dict[str, Any]:
    return {name: value for name, value in config(method).items() if name not in _RATES}


@cache
def _base_hash(model: Any, labels: tuple[str, ...] | None) -> str:
    loaded = models.load(model) if isinstance(model, str) else model()
    if type(loaded).__name__.endswith("ForSequenceClassification"):
        fit_head(loaded, labels)
    return weights_hash(loaded)


def _teacher(arm: Arm) -> gap | None:
    """Return the observer of the gap, which names the teacher; None for an arm on text."""
    return next((observer for observer in arm.settings.get("observe", ()) if isinstance(observer, gap)), None)


def _task(arm: Arm) -> Task:
    return _load(arm.task) if isinstance(arm.task, str) else arm.task


@cache
def _load(name: str) -> Task:
    return tasks.load(name)


def open_jobs(registration: StudyRegistration, evidence: StudyEvidence) -> list[StudyJob]:
    """Return the runs that the evidence lacks: first the judged ones seed by seed, then those that choose rates."""
    choices = chosen_rates(registration, evidence.runs)
    judged, tuning = [], []
    for label, arm in registration.arms.items():
        for seed in range(FIRST_SEED, FIRST_SEED + arm.seeds):
            rate = choices[label].rate
            if rate is not None and not evidence.has(label, seed):
                judged.append(StudyJob(label, seed, "judged", rate))
        if not arm.rate_of:
            # An interrupted tuning has some of the seeds of a rate.
            tried = evidence.runs[(evidence.runs["arm"] == label) & (evidence.runs["role"] == "tuning")]
            finished = set(zip(tried["rate"], tried["seed"], strict=True))
            for rate in choices[label].missing:
                tuning += [
                    StudyJob(label, seed, "tuning", rate) for seed in TUNING_SEEDS if (rate, seed) not in finished
                ]
    # Tables of a set of runs need all of one seed.
    return sorted(judged, key=lambda job: job.seed) + tuning


def train_study(
    folder: Path,
    out: Path,
    registration: StudyRegistration,
    minutes: float = math.inf,
    only: Callable[[str], bool] = bool,
) -> None:
    """Train the open runs one after another, until there are none or the time is over, and merge the kept ones.

    Parameters
    ----------
    folder : path
        Folder of the kept runs.
    out : path
        Folder of the run folders, which resume if they were interrupted.
    registration : StudyRegistration
        Registered arms.
    minutes : float
        No run starts after this many minutes.
    only : callable
        Whether to train an arm, by its label. Default all.

    Raises
    ------
    ValueError
        An arm differs from the registered one.
    """
    _train_open_runs(folder, out, registration, time.monotonic() + 60 * minutes, only)
    # Another process that is merging leaves later runs as they are, which is how they are read as well.
    with suppress(RunLocked), lock_run(folder):
        kept_study.compact(folder)


def _train_open_runs(
    folder: Path, out: Path, registration: StudyRegistration, end: float, only: Callable[[str], bool]
) -> None:
    while True:
        evidence = kept_study.read(folder)
        rates = {label: choice.rate for label, choice in chosen_rates(registration, evidence.runs).items()}
        jobs = [job for job in open_jobs(registration, evidence) if only(job.arm)]
        judged = evidence.runs[evidence.runs["role"] == "judged"]
        finished = set(zip(judged["arm"], judged["seed"], strict=True))
        print(f"Open runs: {len(jobs)}", flush=True)
        if not jobs:
            return
        for job in jobs:
            if time.monotonic() >= end:
                return
            require_registered_arm(job.arm, registration)
            run = finish_job(job, out, rates)
            kept_study.add_run(folder, run)
            print(study_run_line(run.rows), flush=True)
            if job.role == "judged":
                finished.add((job.arm, job.seed))
            # Only now, because a killed process must be able to compute the tables again.
            for label, trained in run.trained.items():
                if job.role == "tuning" or not _has_open_set(label, job.seed, finished):
                    remove_states(trained)


def _has_open_set(label: str, seed: int, finished: set[tuple[str, int]]) -> bool:
    """Return whether a table that reads the run of an arm is not kept yet: that of the last arm of a set."""
    # An arm may be in several sets, such as the first run of the factors on text.
    sets = [labels for tables in KEPT_TABLES.values() for labels, _ in tables]
    return any((labels[-1], seed) not in finished for labels in sets if label in labels)


def require_registered_arm(label: str, registration: StudyRegistration) -> None:
    """Raise a ValueError if an arm to train differs from the registered one."""
    registered = registration.arms[label].hash
    if (hash := _hash_once(label)) != registered:
        raise ValueError(f"cannot train {label!r}: its hash must be {registered}, as registered, got {hash}")


_hash_once = cache(study_arm_hash)


def finish_job(job: StudyJob, out: Path, rates: Mapping[str, float | None]) -> FinishedStudyRun:
    """Train one run and return what is kept of it; a run that diverged has rows without numbers.

    ``rates`` has the rates of the other arms of a set of runs that a kept table is computed from.
    """
    torch.set_num_threads(1)  # numbers depend on the number of threads
    start = time.process_time()  # not wall-clock time, because other processes share the processor
    arm = arm_of_job(job)
    row = {name: getattr(job, name) for name in ("arm", "seed", "role", "rate")}
    row |= machine() | {"commit": code_commit(), "arm_hash": _hash_once(job.arm)}
    row["run"] = f"{_digest(job.arm)}-{job.seed}-{job.role}-{job.rate:g}"
    losses, tables, right, test_rows = pd.DataFrame(columns=["phase", "step", "loss"], dtype="float64"), {}, None, None
    trained: dict[str, Run] = {}
    if isinstance(arm, ComputedArm):
        scored = arm.compute(arm.method, job.seed, job.rate)
        rows, losses = pd.DataFrame([dict(scored.row)]), scored.tables["losses"]
    else:
        try:
            trained[job.arm] = run = _train(job, out)
        except FloatingPointError:  # a rate that is too high, which counts as not learned
            rows = pd.DataFrame({"phase": [""], "task": [""]})
        else:
            rows, losses = _score(run, arm, job.role), _losses(run)
            if job.role == "judged":
                tables = _kept_tables(trained, job, out, rates)
                if job.arm in _scored_by_row():
                    right = run.predictions["margin"].to_numpy() > 0
                    test_rows = identify_test_rows(_task(arm))
    rows = rows.assign(**row, cpu_seconds=time.process_time() - start)
    return FinishedStudyRun(rows, losses, tables, right, test_rows, trained)


@cache
def _scored_by_row() -> set[str]:
    """Return the arms whose accuracy a claim compares row by row."""
    # Their predictions are kept, and those of other arms are not.
    reads = [key for comparison in COMPARISONS.values() for s in comparison.statistics().values() for key in s.reads()]
    return {arm for name, arm in reads if name == "margin"}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def arm_of_job(job: StudyJob) -> Arm | ComputedArm:
    """Return the arm of a run, with its seed and rate; a tuning run is scored on validation text only."""
    arm = arms_by_label()[job.arm]
    if isinstance(arm, ComputedArm):
        return arm
    arm = arm.of_seed(job.seed)
    rates = {name: job.rate for name in _RATES if hasattr(arm.method, name)}
    settings = {**arm.settings, **job.changes}
    if job.role == "tuning":
        teacher = _teacher(arm)
        settings["observe"] = [] if teacher is None else [replace(teacher, split="validation")]
        settings["test_size"] = 16  # the test split must not choose a rate
    return replace(arm, method=replace(arm.method, **rates), settings=settings)


def _train(job: StudyJob, out: Path) -> Run:
    sweep_job = to_sweep_job(job, out)
    assert sweep_job is not None
    return train_job(sweep_job)


def to_sweep_job(job: StudyJob, out: Path) -> Job | None:
    """Return the job with which a sweep trains a run; None if ``train`` does not train it."""
    arm = arm_of_job(job)
    if isinstance(arm, ComputedArm):
        return None
    settings = {"seed": job.seed, "device": "cpu", **arm.settings, "root": out}
    model = partial(models.load, arm.model) if isinstance(arm.model, str) else arm.model
    return Job(model, arm.task, arm.method, settings, job.arm)


def _phases(run: Run) -> Iterator[tuple[str, Run]]:
    """Yield the phases of a run by name; the last one, which is judged, has none."""
    for phase in run.parents:
        name, *_ = phase.meta.phase or [""]
        yield name, phase
    yield "", run


def _losses(run: Run) -> pd.DataFrame:
    """Return the training loss by phase and step."""
    pieces = []
    for name, phase in _phases(run):
        rows = phase.table[phase.table["quantity"] == "loss"]
        pieces.append(rows[["step"]].assign(phase=name, loss=rows["value"]))
    return pd.concat(pieces, ignore_index=True)


def _score(run: Run, arm: Arm, role: str) -> pd.DataFrame:
    """Return the rows of a run: its gaps by phase and task, or its accuracy and loss by phase."""
    teacher = _teacher(arm)
    if teacher is not None:
        return pd.concat([_gap_rows(phase, name, teacher) for name, phase in _phases(run)], ignore_index=True)
    split, size = {"tuning": ("validation", "eval_size"), "judged": ("test", "test_size")}[role]
    scored = _task(arm).split(split)
    if size in arm.settings:
        scored = scored.head(arm.settings[size])
    majority = math.nan
    if "label" in scored:
        majority = float(scored["label"].value_counts(normalize=True).iloc[0])
    rows = []
    for name, phase in _phases(run):
        if role == "tuning":
            final = phase.table[phase.table["step"] == phase.table["step"].max()].set_index("quantity")["value"]
            accuracy, loss = float(final["eval_metric"]), float(final["eval_loss"])
        else:
            accuracy, loss = phase.score.metric, phase.score.loss
        rows.append({"phase": name, "task": "", "accuracy": accuracy, "majority": majority, "loss": loss})
    return pd.DataFrame(rows)


def _gap_rows(phase: Run, name: str, teacher: gap) -> pd.DataFrame:
    rows = phase.table[phase.table["quantity"] == "gap"].sort_values(["step", "index"])
    of_base = base_gaps(teacher.truth, teacher.seed, teacher.split, teacher.single_task)
    pieces = []
    # A phase has several recordings if an early one is scored as well.
    for step, of_step in rows.groupby("step"):
        numbers = of_step["index"].tolist()
        is_mixture = len(numbers) > 1 or teacher.single_task is not None
        labels = [""]
        if is_mixture:
            labels = list(map(task_name, numbers))
        is_early = step == teacher.after and step != phase.table["step"].max()
        table = pd.DataFrame({"task": labels, "gap": of_step["value"].to_numpy(), "base_gap": of_base})
        pieces.append(table.assign(phase="first round" if is_early else name))
    return pd.concat(pieces, ignore_index=True)


def _kept_tables(
    trained: dict[str, Run], job: StudyJob, out: Path, rates: Mapping[str, float | None]
) -> dict[str, pd.DataFrame]:
    """Compute the kept tables that belong to a run; the others of its set are finished, or trained and added now."""
    tables: dict[str, list[pd.DataFrame]] = {}
    for name, functions in KEPT_TABLES.items():
        for labels, function in functions:
            if labels[-1] != job.arm:
                continue
            for label in labels:
                if label not in trained:
                    trained[label] = _train(replace(job, arm=label, rate=rates[label] or 0.0), out)
            tables.setdefault(name, []).append(function(*(trained[label] for label in labels)))
    return {name: pd.concat(pieces, ignore_index=True) for name, pieces in tables.items()}


def score_run(rows: pd.DataFrame) -> RunScore:
    """Return the score of a run from its rows: points of the gap closed, points of accuracy, or the final loss."""
    last = rows[rows["phase"] == ""].reindex(columns=list(STUDY_COLUMNS))
    if last["gap"].notna().any():
        return RunScore(float((100 * (1 - last["gap"] / last["base_gap"])).mean()), "points closed")
    if last["accuracy"].notna().any():
        return RunScore(float(100 * last["accuracy"].mean()), "points of accuracy")
    return RunScore(float(last["loss"].mean()), "final loss")


def study_run_line(rows: pd.DataFrame) -> str:
    """Return the line to print about a trained run, from its rows."""
    row = rows.iloc[-1]
    name = f"{row['arm']}, {row['role']} seed {row['seed']}, rate {row['rate']:g}"
    return f"{name}: {score_run(rows)}, {row['cpu_seconds']:.0f} CPU-seconds"
