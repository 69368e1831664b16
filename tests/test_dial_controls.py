"""Controls of the dial over seeds: an adapter that learned nothing, and the module with the largest path share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FILLER, draw_reviews
from test_dial import QUIET
from test_export import trained

import lorascope as ls
from lorascope.adapters import delta
from lorascope.analysis.dial import KEEP, TASK, WHOLE, judge_rows
from lorascope.inputs import tasks
from lorascope.inputs.text_rows import encode_rows, load_keep
from lorascope.insight.adapted_base import open_adapted
from lorascope.insight.dial import DialedModel, tqdm
from lorascope.insight.update_parts import ScaledUpdates, UpdatePart, group_parts
from lorascope.methods import LoRA
from lorascope.observe.measured_rows import Divergence, TaskLoss
from lorascope.papers.setups import planted_teacher

SEEDS = range(20)
METHOD = LoRA(rank=4, alpha=16.0, targets="all-linear", lr=1e-2, head_lr=1e-2)
STUDENT: dict[str, Any] = {"steps": 60, "batch_size": 16, "eval_every": 0, "test_size": 32, "progress": False}
pytestmark = pytest.mark.slow


def reviews(shuffled: bool, seed: int) -> tasks.Task:
    rows = draw_reviews(0, FILLER)
    if shuffled:
        rows["label"] = np.random.default_rng(seed).permutation(rows["label"])
    return tasks.from_frame(rows, "reviews")


def test_an_adapter_trained_on_shuffled_labels_has_nothing_to_keep(
    bert: str, other_text: tasks.Task, tmp_path: Path
) -> None:
    clean = 0
    for seed in SEEDS:
        task = reviews(True, seed)
        run = trained(bert, task, METHOD, tmp_path / str(seed), steps=60, seed=seed)[1]
        summary = ls.dial(run, bert, task, other_text, by="module", **QUIET).summary()
        clean += not summary["verdict"].isin(["keep", "trade"]).any()
    assert clean >= 19


def test_the_module_with_the_largest_share_on_selection_rows_is_worth_keeping(tmp_path: Path) -> None:
    """Students of a planted teacher: shares on training rows, effects on validation rows."""
    task, other_text = planted_teacher.task(0), planted_teacher.task(1)
    verdicts = []
    for seed in SEEDS:
        method = LoRA(rank=4, targets="all-linear", lr=1e-2)
        out = tmp_path / str(seed)
        run = ls.train(planted_teacher.base(), task, method, seed=seed, out=out, **STUDENT)
        adapted = open_adapted(run, planted_teacher.base(), task, "last")
        base = adapted.base
        axes = {}
        for split in ("train", "validation"):
            task_rows = encode_rows(base, task, split, 128, 64)
            keep_rows = encode_rows(base, load_keep(other_text, task, base), split, 128, 64)
            axes[split] = {TASK: TaskLoss(base, *task_rows), KEEP: Divergence(base, *keep_rows)}
        delta.attach(base, adapted.deltas)
        updates, bar = ScaledUpdates(base, adapted.deltas, {}), tqdm(disable=True)
        parts = group_parts(base, adapted.updates, "module").parts
        shares = DialedModel(updates, axes["train"], bar).path_shares(parts)[TASK]
        largest = parts[int(np.argmax(shares))]
        dialed = DialedModel(updates, axes["validation"], bar)
        whole = UpdatePart(WHOLE, tuple(adapted.deltas))
        values = [*dialed.curve(whole, (0.0, 1.0)), *dialed.removals([largest])]
        rows = {axis: measure.rows() for axis, measure in dialed.measures.items()}
        verdicts.append(judge_rows(values, rows, len(parts), set())[largest.name])
    assert sum(verdict in ("keep", "trade") for verdict in verdicts) >= 18, verdicts
    assert not {"only forgets", "idle"} & set(verdicts)
