"""Measurements of adapters on few sentences, against models whose weights are changed one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BAD, FILLER, GOOD
from torch import nn
from torch.nn import functional as F

import lorascope as ls
from lorascope.inputs import models, tasks
from lorascope.inputs.tasks import Task
from lorascope.insight.adapted_base import open_adapted
from lorascope.papers.judging.study_statistics import are_learned
from lorascope.papers.training import sentence_measures
from lorascope.papers.training.sentence_measures import MEASURED_ROWS, SCALES, few_sentences
from lorascope.papers.training.student_measures import Measured

OPPOSITE = {"negative": "positive", "positive": "negative"}


def made_up_task() -> Task:
    generator = np.random.default_rng(0)
    rows = []
    for label in generator.choice(["negative", "positive"], 900):
        words = [*generator.choice(FILLER, 4), generator.choice(GOOD if label == "positive" else BAD)]
        rows.append({"text": " ".join(generator.permutation(words)), "label": label})
    return tasks.from_frame(pd.DataFrame(rows), "reviews")


@pytest.fixture(scope="module")
def measured(bert: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, ls.Run, Task]:
    """Return what is measured on a tiny model, with its run and task."""
    root, task = tmp_path_factory.mktemp("sentences"), made_up_task()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentence_measures, "BASE", bert)
        patch.setattr(sentence_measures, "few_sentences", lambda: task)
        patch.setattr(sentence_measures, "SENTENCE_METHOD", replace(sentence_measures.SENTENCE_METHOD, lr=1e-2))
        result = sentence_measures.measure_sentences(9001, root)
    (folder,) = root.glob("*/run.json")
    return result, ls.load(folder.parent), task


def row_losses(run: ls.Run, bert: str, task: Task, scale: float = 1.0, removed: str = "") -> np.ndarray:
    """Return the losses of the measured rows with scaled updates in plain weights, and one of them left out."""
    # This base has the trained head, and no adapters.
    model: nn.Module = open_adapted(run, bert, task, "last").base.eval()
    with torch.no_grad():
        for name, update in run.updates(state="last").items():
            if name != removed:
                model.get_submodule(name).weight += scale * torch.tensor(update.dense()).float()
        table = task.split("test").head(MEASURED_ROWS)
        batch = task.fit(model).encode(models.processor(model), table, 32).batch(range(len(table)))
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none").numpy()


def test_learn_by_module_is_the_loss_without_its_update(measured: tuple[Measured, ls.Run, Task], bert: str) -> None:
    result, run, task = measured
    losses = row_losses(run, bert, task)
    modules = result.tables["modules"]
    assert set(modules["module"]) == set(run.updates())
    for module, norm, even, odd in modules.to_numpy():
        learn = row_losses(run, bert, task, removed=module) - losses
        assert even == pytest.approx(learn[::2].mean(), abs=1e-5)
        assert odd == pytest.approx(learn[1::2].mean(), abs=1e-5)
        assert norm == pytest.approx(np.linalg.norm(run.updates()[module].dense()), rel=1e-5)


def test_curve_has_the_losses_with_the_right_and_the_other_label(
    measured: tuple[Measured, ls.Run, Task], bert: str
) -> None:
    result, run, task = measured
    other = replace(task, table=task.table.assign(label=task.table["label"].map(OPPOSITE)))
    curve = result.tables["curve"]
    assert tuple(curve["scale"]) == SCALES
    for scale, right, wrong in curve.to_numpy():
        assert right == pytest.approx(row_losses(run, bert, task, scale).mean(), abs=1e-5)
        assert wrong == pytest.approx(row_losses(run, bert, other, scale).mean(), rel=1e-3)


def test_row_has_the_accuracy_of_the_measured_rows(measured: tuple[Measured, ls.Run, Task], bert: str) -> None:
    result, run, task = measured
    labels = task.split("test").head(MEASURED_ROWS)["label"]
    (row,) = result.rows.to_dict("records")
    # A row is right if its label has the smaller loss of the two.
    other = replace(task, table=task.table.assign(label=task.table["label"].map(OPPOSITE)))
    assert row["accuracy"] == np.mean(row_losses(run, bert, task) < row_losses(run, bert, other))
    assert row["majority"] == labels.value_counts().max() / len(labels)
    assert are_learned(result.rows.assign(gap=np.nan, base_gap=np.nan, first_loss=np.nan)).all()
    assert result.tables["evaluations"]["step"].to_list() == [0, 20, 40, 60, 80, 100]


def test_few_sentences_are_the_first_of_training_with_another_hash() -> None:
    every, few = tasks.load("sentiment/products"), few_sentences()
    pd.testing.assert_frame_equal(few.split("train"), every.split("train").head(192))
    for split in ("validation", "test"):
        pd.testing.assert_frame_equal(few.split(split), every.split(split))
    # Registered runs were trained on this text.
    assert few.hash[:12] != every.hash[:12]
