"""Training of the evidence: the open runs of the registration, each of which is kept as soon as it is finished.

The runs are stored in another folder. The evidence keeps a row of each, its predictions, and the tables that statistics
read. Saved parameters are deleted then.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed

from lorascope import __version__
from lorascope.experiments.executors import ignore_replaced_workers
from lorascope.experiments.sweep import Job, train_job, width
from lorascope.inputs import models, tasks
from lorascope.inputs.classifier_head import fit_head, weights_hash
from lorascope.inputs.task_parts import first_test_rows, identify_test_rows
from lorascope.inputs.tasks import Task
from lorascope.methods.method import config
from lorascope.papers.figures import redraw
from lorascope.papers.judging import kept_figures, kept_runs, registration, verification
from lorascope.papers.judging.looks import BUDGET
from lorascope.papers.judging.registration import Registration, arm_hash
from lorascope.papers.judging.verdicts import PHASES
from lorascope.papers.probe import Arm, OwnArm
from lorascope.papers.registry import PAIRS, PROBES, SECTIONS
from lorascope.papers.training.missing_runs import OpenRun, missing_runs
from lorascope.runs.folders import lock_run
from lorascope.runs.run import Run
from lorascope.runs.writer import remove_states
from lorascope.training.processor import processor_name
from lorascope.training.settings import Settings

# The rates and what is observed or scored do not change how a run trains.
_NOT_HASHED = ("lr", "head_lr", "eval_every", "test_size")


@cache
def registered_arms() -> dict[str, Arm | OwnArm]:
    """Return the registered arms of all probes, as they are trained, by label.

    Raises
    ------
    ValueError
        Two arms have the same label.
    """
    by_label: dict[str, Arm | OwnArm] = {}
    for probe in PROBES.values():
        for arm in probe.arms():
            if by_label.setdefault(arm.label, arm) is not arm:
                raise ValueError(f"labels must be unique, got two arms with label {arm.label!r}")
    return by_label


def keep_functions() -> dict[tuple[str, str], Callable[..., pd.DataFrame]]:
    """Return the functions of all probes that compute a kept table when an arm is trained, by table and arm."""
    return {key: make for probe in PROBES.values() for key, make in probe.keep.items()}


def block() -> dict[str, Any]:
    """Return the columns of ``runs.csv`` that identify the machine on which arms are trained."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"capability": capability, "torch": str(torch.__version__), "threads": 1, "device": "cpu"}


def arm_hashes(claims: Registration) -> dict[str, str]:
    """Compute the hash of every registered arm, as it would be trained, from the code, by label."""
    hashes = {}
    for label, registered in claims.arms.items():
        rate = next(iter(registered.rates), None)  # any rate, because it is not hashed
        row = _describe(arm_of_run(OpenRun(label, 100, "judged", rate), claims))
        method, settings = json.loads(row["method"]), json.loads(row["settings"])
        hashes[label] = arm_hash(registered, method, settings, row["task_hash"], row["w0"])
    return hashes


def write_evidence(folder: Path, out: Path, minutes: float = math.inf, registered: Path = registration.FILE) -> None:
    """Train the arms whose runs the registration asks for and the evidence lacks, until no claim is open.

    At the end, figures of the kept runs are drawn into the folder ``figures`` of the repository, and everything that
    follows from the runs is written.

    Parameters
    ----------
    folder : path
        Folder of evidence. Every finished run is added at once, so training can be interrupted at any time.
    out : path
        Folder of the runs. Interrupted ones resume.
    minutes : float
        No run starts after this many minutes.
    registered : path
        File of the registration, in the folder ``data`` of the repository.

    Raises
    ------
    ValueError
        An arm differs from the registered one.
    """
    claims, end = registration.read(registered), time.monotonic() + 60 * minutes
    reads = read_by_claims(claims)
    require_registered(claims)
    while time.monotonic() < end:
        evidence = kept_runs.read_kept(folder)
        open_runs, spent = missing_runs(claims, PAIRS, evidence, block()), evidence.runs["cpu_seconds"].sum() / 60
        print(f"Open runs: {len(open_runs)}. CPU-minutes used: {spent:.0f} of {BUDGET}.", flush=True)
        if not open_runs or spent >= BUDGET:
            break
        # A run is only taken from the list when a process is free, so the time is read then.
        train_runs((run for run in open_runs if time.monotonic() < end), claims, reads, folder, out)
    if (folder / "runs.csv").exists():
        evidence = kept_runs.read(folder)
        derived = verification.derive(evidence, claims, PAIRS)
        verification.write_derived(folder, derived, registered)
        images = registered.parents[1] / kept_figures.FOLDER
        redraw.draw_figures(folder, out, images, SECTIONS, str(code_version()["commit"]))
        verification.write_derived(folder, derived, registered)  # again, since the manifest lists the figures


def require_registered(claims: Registration) -> None:
    """Raise a ValueError if an arm to train differs from the registered one."""
    for label, hash in arm_hashes(claims).items():
        if hash != claims.arms[label].hash:
            raise ValueError(f"cannot train {label!r}: it differs from the registered arm, whose hash must be {hash}")


def train_runs(
    open_runs: Iterable[OpenRun], claims: Registration, reads: Mapping[str, Sequence[Read]], folder: Path, out: Path
) -> None:
    """Train runs of arms in parallel processes; add each to the evidence in ``folder`` and print its line at its end.

    Parameters
    ----------
    open_runs : iterable of OpenRun
        Runs to train.
    claims : Registration
        Registered arms.
    reads : mapping arm -> sequence of Read
        Scores and tables to keep.
    folder, out : path
        Folder of evidence, and folder of the runs.

    Raises
    ------
    RunLocked
        Another process adds runs to the folder of evidence.
    """
    calls = (delayed(finish)(run, claims, reads.get(run.arm, []), out) for run in open_runs)
    workers = Parallel(width(), return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
    with lock_run(folder), ignore_replaced_workers():
        for finished in workers(calls):
            if len(finished.rows):
                kept_runs.add_rows(folder, finished.rows)
            kept_runs.add_run(folder, finished.row, finished.scores, finished.tables)
            print(run_line(finished.row), flush=True)


def run_line(row: Mapping[str, Any]) -> str:
    """Return the line to print about a trained run of an arm."""
    rate = ""
    if row["rate"] is not None:
        rate = f", rate {row['rate']:g}"
    scores = f"validation loss {row['validation_loss']:.4g}, metric {row['validation_metric']:.4g}"
    return f"{row['arm']}, {row['role']} seed {row['seed']}{rate}: {scores}, {row['cpu_seconds'] / 60:.1f} CPU-minutes"


@dataclass(frozen=True)
class Read:
    """Table or scores of a trained arm that claims read: name, seeds, and other arms that a table is computed from."""

    name: str
    seeds: range
    other_arms: tuple[str, ...]


def read_by_claims(claims: Registration) -> dict[str, list[Read]]:
    """Return what claims read of each arm to train, and the predictions of arms that only figures show."""
    reads: dict[tuple[str, str], Read] = {}
    for label, arm in claims.arms.items():
        if arm.seeds:
            seeds = range(claims.first_seed, claims.first_seed + arm.seeds)
            reads["margin", label] = Read("margin", seeds, ())
    for id, claim in claims.of_tier("primary", "secondary").items():
        seeds = range(claim.design.first_seed, claim.design.first_seed + claim.design.seeds[-1])
        for key, other_arms in (PAIRS[id][0].reads() | PAIRS[id][1].reads()).items():
            longest = seeds
            if key in reads:  # several claims read it, each at its looks
                longest = max(seeds, reads[key].seeds, key=len)
            reads[key] = Read(key[0], longest, other_arms)
    by_arm: dict[str, list[Read]] = {}
    for (_, label), read in reads.items():
        by_arm.setdefault(label, []).append(read)
    return by_arm


@dataclass(frozen=True)
class FinishedRun:
    """Parts of an arm's trained run that the evidence keeps, and the test rows of its task."""

    row: Mapping[str, Any]
    scores: Mapping[str, np.ndarray]
    tables: Mapping[str, pd.DataFrame]
    rows: pd.DataFrame


def finish(open_run: OpenRun, claims: Registration, reads: Sequence[Read], out: Path) -> FinishedRun:
    """Train one run of an arm in this process, and return what is kept of it."""
    torch.set_num_threads(1)  # runs are parallel, and numbers depend on the number of threads
    start = time.process_time()
    arm = arm_of_run(open_run, claims)
    id = f"{_digest(arm.label, 12)}-{open_run.seed}"
    row = dict.fromkeys(kept_runs.RUN_COLUMNS) | vars(open_run) | block() | _describe(arm) | code_version()
    row |= {"run": id, "arm_hash": claims.arms[arm.label].hash, "processor": processor_name()}
    scores: dict[str, np.ndarray] = {}
    tables: dict[str, pd.DataFrame] = {}
    if isinstance(arm, OwnArm):
        result = arm.compute(open_run.seed)
        row, scores, tables = row | dict(result.row), dict(result.scores), dict(result.tables)
    else:
        try:
            run = _train(arm, open_run, out)
            row |= _scores(run, arm, open_run.role)
            if open_run.role == "judged":
                for read in reads:
                    if open_run.seed not in read.seeds:
                        continue
                    if read.name in run.predictions:
                        scores[read.name] = run.predictions[read.name].to_numpy()
                    else:
                        tables[read.name] = _keep_table(read, run, open_run, claims, out)
                if len(phases := keep_phases(run, _task(arm))):
                    tables[PHASES] = phases
            remove_states(run)
        except FloatingPointError:  # a learning rate that is too high
            row |= dict.fromkeys(("validation_loss", "test_loss"), math.inf)
            row |= dict.fromkeys(("validation_metric", "test_metric"), 0.0)
            if open_run.rate is not None:
                row["run"] = f"{id}-{open_run.rate:g}"
            if open_run.role == "judged":  # wrong on every row
                lost = {"margin": np.int8(0), "nll": np.float16(np.inf)}
                count = len(_task(arm).split("test"))
                scores = {read.name: np.full(count, lost[read.name]) for read in reads if read.name in lost}
    rows = pd.DataFrame()
    if scores:
        rows = identify_test_rows(_task(arm))
    # Another machine gives the same run other numbers.
    row |= {"run": f"{row['run']}-{_digest(json.dumps(block()), 6)}", "cpu_seconds": time.process_time() - start}
    return FinishedRun(row, scores, tables, rows)


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _keep_table(read: Read, run: Run, open_run: OpenRun, claims: Registration, out: Path) -> pd.DataFrame:
    """Compute a kept table of a run; the other runs of its set are finished, or trained now."""
    other_runs = []
    for label in read.other_arms:
        other = replace(open_run, arm=label)
        other_runs.append(_train(arm_of_run(other, claims), other, out))
    return keep_functions()[read.name, open_run.arm](run, *other_runs)


def keep_phases(run: Run, task: Task) -> pd.DataFrame:
    """Return the kept table ``phases`` of a run, empty without earlier phases or classes; see ``verdicts.PHASES``."""
    table = []
    if run.parents and task.classifies:
        rows = identify_test_rows(task)
        chance = rows.groupby("group")["label"].agg(lambda labels: labels.value_counts(normalize=True).max())
        for phase in run.parents:
            # Linear probes leave the model as it is, so the accuracy of the head is not theirs.
            if phase.meta.parameters.trained == phase.meta.parameters.head:
                continue
            name, *_ = phase.meta.phase or [""]
            for group, accuracy in (phase.score.groups or {"": phase.score.metric}).items():
                row = {"phase": name, "group": group, "accuracy": accuracy, "chance": chance[group]}
                table.append(row)
    return pd.DataFrame(table)


def arm_of_run(open_run: OpenRun, claims: Registration) -> Arm | OwnArm:
    """Return the arm to train for a run, with its seed and learning rate."""
    arm = registered_arms()[open_run.arm]
    if isinstance(arm, OwnArm):
        return arm
    arm = arm.of_seed(open_run.seed)
    rates = {}
    if open_run.rate:
        rates = claims.arms[arm.label].fields_at(open_run.rate)
    settings, task = dict(arm.settings), _task(arm)
    if number := settings.pop("test_size", None):
        task = first_test_rows(task, number)
    if open_run.role == "tuning":  # whose test scores and records are not kept
        settings |= {"observe": [], "test_size": 16}
    return replace(arm, method=replace(arm.method, **rates), settings=settings, task=task)


def _train(arm: Any, open_run: OpenRun, out: Path) -> Run:
    # The settings come after the seed, because ``vary`` may set a different seed in them.
    settings = {"seed": open_run.seed, "device": "cpu", **arm.settings, "root": out}
    model = partial(models.load, arm.model) if isinstance(arm.model, str) else arm.model
    return train_job(Job(model, arm.task, arm.method, settings))


def _task(arm: Arm | OwnArm) -> Task:
    if isinstance(arm.task, Task):
        return arm.task
    return _load(arm.task)


@cache
def _load(name: str) -> Task:
    return tasks.load(name)


def _describe(arm: Arm | OwnArm) -> dict[str, Any]:
    """Return the columns of the row that an arm determines."""
    about, labels = {"task": "-", "task_hash": "-"}, None
    if arm.task:
        task = _task(arm)
        about = {"task": task.name, "task_hash": task.hash}
        if task.classifies:
            labels = task.labels
    if isinstance(arm, OwnArm):
        return about | {"method": json.dumps(arm.method), "settings": "{}", "model": "-", "w0": "-"}
    fixed = {name: value for name, value in arm.settings.items() if name not in ("observe", "seed")}
    settings = Settings(lr=1.0, head_lr=1.0, **fixed).to_dict()
    name, w0 = _base(arm.model, labels)
    return about | {
        "method": json.dumps(config(arm.method)),
        "settings": json.dumps({name: value for name, value in settings.items() if name not in _NOT_HASHED}),
        "steps": settings["steps"],
        "model": name,
        "w0": w0,
    }


@cache
def _base(model: Any, labels: tuple[str, ...] | None) -> tuple[str, str]:
    """Return name and hash of the base weights of a model."""
    loaded = models.load(model) if isinstance(model, str) else model()
    if type(loaded).__name__.endswith("ForSequenceClassification"):
        fit_head(loaded, labels)
    # A model of this project is a folder of the cache, whose place depends on the machine.
    return Path(models.name_of(loaded)).name, weights_hash(loaded)


def _scores(run: Run, arm: Arm, role: str) -> dict[str, Any]:
    """Return the columns of the row that a run determines."""
    final = run.table[run.table["step"] == run.table["step"].max()].set_index("quantity")["value"]
    rows = _task(arm).split("validation").head(arm.settings["eval_size"])
    chance = test_loss = test_metric = math.nan
    if "label" in rows:  # else the metric is a perplexity, which has no chance level
        chance = rows["label"].value_counts(normalize=True).iloc[0]
    if role == "judged":  # the test split must not choose a rate
        test_loss, test_metric = run.score.loss, run.score.metric
    return {
        "run": run.id, "trained_parameters": run.meta.parameters.trained,
        "validation_loss": float(final["eval_loss"]), "validation_metric": float(final["eval_metric"]),
        "validation_chance": float(chance), "test_loss": test_loss, "test_metric": test_metric,
    }  # fmt: skip


@cache
def code_version() -> dict[str, Any]:
    """Return commit and versions; without a git repository, the version of the package takes the place of a commit."""
    root = registration.FILE.parents[1]

    def git(*arguments: str) -> str:
        # The repository of this project, not one that contains the folder.
        command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", *arguments]
        done = subprocess.run(command, cwd=root / "lorascope", capture_output=True, check=True, text=True)
        return done.stdout.strip()

    try:
        commit, dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit, dirty = __version__, False
    return {"commit": commit, "dirty": dirty, "numpy": np.__version__}
