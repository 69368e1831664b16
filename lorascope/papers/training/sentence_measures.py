"""Adapters trained on few sentences and measured with the dial, for the questions about the instruments."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lorascope.adapters.delta import attach
from lorascope.analysis.dial import TASK, WHOLE
from lorascope.array_types import Float
from lorascope.inputs import tasks
from lorascope.inputs.tasks import Task
from lorascope.inputs.text_rows import encode_rows
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.dial import DialedModel
from lorascope.insight.update_parts import ScaledUpdates, UpdatePart, group_parts
from lorascope.methods import LoRA
from lorascope.observe.measured_rows import TaskLoss
from lorascope.papers.training.student_measures import Measured
from lorascope.training.loop import train

BASE = "minilm"
SENTENCE_ROWS = 192
"""Training sentences: few enough for the best evaluation to precede the last step."""
MEASURED_ROWS = 256
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
SENTENCE_METHOD = LoRA(rank=8, alpha=8.0, targets="all-linear", lr=1.5e-3, head_lr=1.5e-3)
SENTENCE_SETTINGS: dict[str, Any] = {
    "steps": 100, "schedule": "constant", "batch_size": 16, "eval_every": 20, "eval_size": 96, "test_size": 16,
    "max_length": 32, "device": "cpu", "progress": False,
}  # fmt: skip


def few_sentences() -> Task:
    """Return reviews of products of which only the first training sentences are left."""
    task = tasks.load("sentiment/products")
    table = task.table.drop(index=task.split("train").index[SENTENCE_ROWS:])
    # The identity of a run has only this hash of its text.
    hash = hashlib.sha256(f"{task.hash} {SENTENCE_ROWS}".encode()).hexdigest()
    return replace(task, table=table, hash=hash)


def measure_sentences(seed: int, out: Path) -> Measured:
    """Train an adapter on few sentences, and measure its last state on test rows: scales of all modules, and removals.

    Tables are ``curve`` (``scale, loss, wrong_loss``), ``modules`` (``module, norm, learn_even, learn_odd``) and
    ``evaluations`` (``step, loss``), with losses and learn in nats per row.
    """
    task = few_sentences()
    run = train(BASE, task, SENTENCE_METHOD, seed=seed, root=out, **SENTENCE_SETTINGS)
    adapted = open_adapted(run, BASE, task, "last")
    rows = encode_rows(adapted.base.eval(), adapted.task, "test", MEASURED_ROWS, SENTENCE_SETTINGS["max_length"])
    attach(adapted.base, adapted.deltas)
    measures = {TASK: TaskLoss(adapted.base, *rows)}
    dialed = DialedModel(ScaledUpdates(adapted.base, adapted.deltas, {}), measures, tqdm(disable=True))
    losses = scaled_losses(adapted, dialed)
    row = {
        "phase": "",
        "task": "products",
        # With two classes, a row is right if its class is the more likely one.
        "accuracy": float((losses[1.0] < np.log(2)).mean()),
        "majority": float(rows.table["label"].value_counts(normalize=True).max()),
        "loss": float(losses[1.0].mean()),
    }
    evaluations = run.table[run.table["quantity"] == "eval_loss"]
    tables = {
        "curve": curve_table(losses),
        "modules": module_table(adapted, dialed, losses[1.0]),
        "evaluations": evaluations[["step"]].assign(loss=evaluations["value"]).reset_index(drop=True),
    }
    training = run.table[run.table["quantity"] == "loss"]
    return Measured(pd.DataFrame([row]), training[["step"]].assign(phase="", loss=training["value"]), tables)


def scaled_losses(adapted: AdaptedBase, dialed: DialedModel) -> dict[float, Float[np.ndarray, "row"]]:
    """Return the task loss of every row by scale of the whole update, in nats."""
    curve = dialed.curve(UpdatePart(WHOLE, tuple(adapted.deltas)), SCALES)
    return {measured.scale: measured.values for measured in curve}


def curve_table(losses: dict[float, Float[np.ndarray, "row"]]) -> pd.DataFrame:
    """Tabulate the mean loss by scale in nats, with the right and with the other of two labels."""
    rows = []
    for scale, right in losses.items():
        # The other class has the rest of the probability, of which float32 leaves nothing beyond 16 nats.
        wrong = -np.log(-np.expm1(-np.maximum(right, 1e-7)))
        rows.append((scale, float(right.mean()), float(wrong.mean())))
    return pd.DataFrame(rows, columns=["scale", "loss", "wrong_loss"])


def module_table(adapted: AdaptedBase, dialed: DialedModel, losses: Float[np.ndarray, "row"]) -> pd.DataFrame:
    """Tabulate the norm of every module's update, and its learn in nats on rows of even and of odd number."""
    rows = []
    for removal in dialed.removals(group_parts(adapted.base, adapted.updates, "module").parts):
        learn = removal.values - losses
        norm = adapted.updates[removal.part].norm()
        rows.append((removal.part, norm, float(learn[::2].mean()), float(learn[1::2].mean())))
    return pd.DataFrame(rows, columns=["module", "norm", "learn_even", "learn_odd"])
