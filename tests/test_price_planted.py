"""Directions beyond the rank on text of planted teachers: more of them at smaller ranks, none at the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

import lorascope as ls
from lorascope.adapters import delta
from lorascope.adapters.host_weights import host_weight
from lorascope.analysis.gradient_signal import count_directions
from lorascope.inputs import tasks
from lorascope.inputs.text_rows import encode_rows
from lorascope.insight.adapted_base import open_adapted
from lorascope.insight.missing_directions import CONTROL, REAL, find_signals
from lorascope.insight.price import make_blocks
from lorascope.observe.measured_rows import TaskLoss
from lorascope.papers.setups import planted_teacher
from lorascope.updates import LowRank

RANKS = (1, 2, 4)
SEEDS = 5
STEPS = 150
ROWS = {"train": 2000, "validation": 1280, "test": 20}


class Counts(NamedTuple):
    """Directions of a state, with real and with drawn labels."""

    real: int
    control: int


def sample_task(seed: int) -> tasks.Task:
    """Sample text from all that the teacher predicts; ``planted_teacher.task`` never has the padding token."""
    torch.manual_seed(seed)
    total = sum(ROWS.values())
    sampling = GenerationConfig(do_sample=True, top_k=0, max_length=planted_teacher.LENGTH, pad_token_id=0)
    first = torch.randint(0, planted_teacher.VOCABULARY, (total, 1))
    teacher: Any = planted_teacher.teacher(seed)
    tokens = teacher.generate(first, attention_mask=torch.ones_like(first), generation_config=sampling)
    lines = [" ".join(map(planted_teacher.token_word, row)) for row in tokens.tolist()]
    splits = np.repeat(list(ROWS), list(ROWS.values()))
    return tasks.from_frame(pd.DataFrame({"text": lines, "split": splits}), f"text of teacher {seed}")


def count(model: Any, updates: dict[str, LowRank], task: tasks.Task) -> Counts:
    text = encode_rows(model, task.fit(model), "validation", ROWS["validation"], planted_teacher.LENGTH)
    loss = TaskLoss(model.eval(), *text)
    signals = find_signals(model, updates, loss, make_blocks(text, loss.clusters), tqdm(disable=True))
    return Counts(*(sum(count_directions(signals[kind]).values()) for kind in (REAL, CONTROL)))


def count_at_teacher(seed: int, task: tasks.Task) -> Counts:
    """Count without factors, so that all of the gradient is beyond them."""
    model = planted_teacher.teacher(seed).requires_grad_(False)
    nothing = {}
    for name in planted_teacher.planted_ranks(seed):
        out_features, in_features = host_weight(model.get_submodule(name)).shape
        nothing[name] = LowRank(np.zeros((out_features, 1)), np.zeros((1, in_features)))
    return count(model, nothing, task)


def count_at_student(seed: int, rank: int, task: tasks.Task, folder: Path) -> Counts:
    method = ls.LoRA(rank=rank, targets="all-linear", lr=1e-2)
    settings: dict[str, Any] = {"steps": STEPS, "seed": seed, "eval_every": 0, "progress": False, "observe": ()}
    run = ls.train(planted_teacher.base(), task, method, out=folder / f"{seed}-{rank}", **settings)
    adapted = open_adapted(run, planted_teacher.base(), task, "last")
    delta.attach(adapted.base, adapted.deltas)
    return count(adapted.base, dict(run.updates()), task)


@pytest.mark.slow
def test_directions_fall_with_the_rank_and_neither_teacher_nor_control_has_any(tmp_path: Path) -> None:
    with_control = 0
    for seed in range(SEEDS):
        task = sample_task(seed)
        teacher = count_at_teacher(seed, task)
        students = [count_at_student(seed, rank, task, tmp_path) for rank in RANKS]
        print(seed, teacher, *students)
        first, second, fourth = (student.real for student in students)
        assert first > second > fourth
        assert teacher.real == 0
        with_control += sum(state.control > 0 for state in (teacher, *students))
    assert with_control <= 1  # of 20 states
