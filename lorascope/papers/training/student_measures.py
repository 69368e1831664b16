"""Students of a planted teacher, their forks, and the price of their rank, for the questions about the instruments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from lorascope.adapters.delta import attach
from lorascope.analysis.fork_effects import fork_effects
from lorascope.inputs.tasks import Task
from lorascope.inputs.text_rows import encode_rows
from lorascope.insight.adapted_base import open_adapted
from lorascope.insight.price import price
from lorascope.methods import LoRA
from lorascope.observe.measured_rows import TaskLoss
from lorascope.papers.instruments import FORK_STEP, LATE_STEP
from lorascope.papers.judging.truth_names import UNEVEN
from lorascope.papers.setups import planted_teacher, planted_truths
from lorascope.runs.run import Run
from lorascope.training.fork import fork
from lorascope.training.loop import train

STUDENT_METHOD = LoRA(rank=4, alpha=16.0, targets="all-linear", lr=1e-2, head_lr=1e-2)
STUDENT_SETTINGS: dict[str, Any] = {"steps": 200, "eval_every": 0, "eval_size": 16, "test_size": 400}
REPLICATES = 4
"""Training seeds per teacher, whose spread is compared with that of their forks."""
FORK_RATE = 3e-3
_ALL: dict[str, Any] = {"batch_size": 16, "device": "cpu", "progress": False}


class Measured(NamedTuple):
    """Result of a seed: rows of ``runs`` (one per task), training losses ``phase, step, loss``, and kept tables."""

    rows: pd.DataFrame
    losses: pd.DataFrame
    tables: dict[str, pd.DataFrame]


def measure_students(seed: int, out: Path) -> Measured:
    """Train students of a planted teacher, fork them, and measure the price of their rank."""
    task, base = planted_truths.sampled_task(UNEVEN, seed), planted_teacher.base()
    runs, forks = [], []
    for replicate in range(REPLICATES):
        # Ten seeds per teacher, so that no two teachers have a training seed in common.
        settings: dict[str, Any] = {"seed": 10 * seed + replicate, "keep_checkpoints": (FORK_STEP, LATE_STEP)}
        run = train(base, task, STUDENT_METHOD, root=out, **_ALL, **STUDENT_SETTINGS, **settings)
        runs.append(run)
        for step in (FORK_STEP, LATE_STEP):
            forks.append(fork(run, base, task, step=step, lr=FORK_RATE, device="cpu", progress=False))
    effects = fork_effects(forks).table
    priced = price(runs[0], base, task, ranks=(2,), retrain=1, placed=True, progress=False)
    rows = []
    retrained: Any
    for retrained in priced.runs.itertuples():
        name = "placed ranks" if retrained.placed else f"rank {retrained.rank}"
        rows.append((name, retrained.lr, retrained.loss))
    trunk = float(priced.runs["loss"].to_numpy()[priced.runs["rank"] == STUDENT_METHOD.rank].item())
    rows.append(("cut to rank 2", STUDENT_METHOD.lr, trunk + float(priced.table["cut"].to_numpy()[0])))
    # Placed ranks cannot be better than those of the teacher.
    planted = replace(STUDENT_METHOD, rank=planted_truths.uneven_ranks(planted_teacher.student(), seed))
    short = replace(STUDENT_METHOD, rank=2)
    quarter = {"steps": STUDENT_SETTINGS["steps"] // 4}
    for name, method, change in (("planted ranks", planted, {}), ("rank 2, a quarter of the steps", short, quarter)):
        settings = STUDENT_SETTINGS | change | {"seed": 10 * seed}
        run = train(base, task, method, root=out, **_ALL, **settings)
        adapted = open_adapted(run, base, task, "last")
        attach(adapted.base, adapted.deltas)
        rows.append((name, method.lr, _mean_loss(adapted.base, adapted.task)))
    students = pd.DataFrame(rows, columns=["student", "lr", "loss"])
    bounds = []
    for model in (planted_truths.teachers(UNEVEN, seed)[0], planted_teacher.student()):
        bounds.append(_mean_loss(model, task.fit(model)))
    # A student that stops early is a control, and need not learn.
    best = students.groupby("student", sort=False)["loss"].min().drop("rank 2, a quarter of the steps")
    table = pd.DataFrame({"task": best.index, "gap": best.to_numpy() - bounds[0], "base_gap": bounds[1] - bounds[0]})
    tables = {"students": students, "forks": effects[["step", "loss_trunk", "loss_fork"]]}
    return Measured(table.assign(phase=""), _training_losses(runs[0]), tables)


def _mean_loss(model: nn.Module, task: Task) -> float:
    """Return the task loss of a model on all validation rows, in nats per token."""
    rows = encode_rows(model, task, "validation", 200, 128)
    loss = TaskLoss(model.eval(), *rows)
    return float(loss.values().sum() / loss.counts.sum())


def _training_losses(run: Run) -> pd.DataFrame:
    rows = run.table[run.table["quantity"] == "loss"]
    return rows[["step"]].assign(phase="", loss=rows["value"])
