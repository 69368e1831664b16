"""Tests of tasks with numbers as labels: their labels, training and metrics."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import lorascope as ls
from lorascope.inputs import models, tasks
from lorascope.training.base_weights import prepare_model
from lorascope.training.evaluation import evaluate
from lorascope.training.session import Session


def table(rows: int = 60) -> pd.DataFrame:
    """Return distinct texts with ratings in halves."""
    numbers = range(rows)
    texts = [f"{number} {'good ' * (number % 5)}film" for number in numbers]
    return pd.DataFrame({"text": texts, "label": [number % 5 / 2 for number in numbers]})


@pytest.mark.parametrize("labels", [[0.5, 1, 2] * 20, ["0.5", "1", " 2.0 "] * 20, np.array([0.5, 1, 2] * 20)])
def test_labels_with_a_fraction_are_numbers(labels):
    task = tasks.from_frame(table().assign(label=labels))
    assert (task.kind, task.labels, task.predicts) == ("regression", (), ("values",))
    assert sorted(set(task.table["label"])) == [0.5, 1.0, 2.0]


def test_whole_numbers_are_classes_unless_the_kind_is_regression():
    rows = table().assign(label=[number % 5 for number in range(60)])
    assert tasks.from_frame(rows).kind == "classification"
    task = tasks.from_frame(rows, kind="regression")
    assert task.kind == "regression"
    assert task.table["label"].dtype == float
    assert task.hash != tasks.from_frame(rows).hash


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        (["0.5", "good"] * 30, {}, "label in row 1 of x.csv must be a class name or whole number, got '0.5'"),
        (
            [0.5] * 59 + [float("nan")],
            {"kind": "regression"},
            "label in row 60 of x.csv must be a finite number, got nan",
        ),
        (["1", "good"] * 30, {"kind": "regression"}, "label in row 2 of x.csv must be a finite number, got 'good'"),
        ([0.5] * 60, {"kind": "rating"}, "kind must be 'classification' or 'regression', got 'rating'"),
    ],
)
def test_invalid_labels_raise_one_line(labels, options, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        tasks.from_frame(table().assign(label=labels), "x.csv", **options)


def test_kind_without_labels_raises():
    with pytest.raises(ValueError, match=r"^columns of table must include text and label for kind='regression'$"):
        tasks.from_frame(table()[["text"]], kind="regression")


def test_language_model_cannot_predict_numbers(gpt2):
    with pytest.raises(
        ValueError, match=r"^cannot use table with GPT2LMHeadModel: regression requires a classifier head$"
    ):
        tasks.from_frame(table()).fit(models.load(gpt2))


@pytest.fixture
def load_without_dropout(bert):
    """Return a function that loads a model for a task, without dropout."""

    def load(task):
        model = models.load(bert, task=task)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    return load


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_equal_a_plain_loop_with_squared_error(load_without_dropout, tmp_path, monkeypatch, accumulate):
    task = tasks.from_frame(table())
    batches = []

    def record(session, index):
        batches.append(draw(session, index))
        return batches[-1]

    draw = Session.batch
    monkeypatch.setattr(Session, "batch", record)
    settings = {"steps": 5, "batch_size": 4, "lr": 1e-3, "head_lr": 1e-3, "schedule": "constant", "warmup": 0}
    settings |= {"clip": None, "accumulate": accumulate, "progress": False}
    model, reference = load_without_dropout(task), load_without_dropout(task)
    ls.train(model, task, "full", out=tmp_path / "run", **settings)
    prepare_model(reference, task, 0)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    reference.train()
    assert len(batches) == 5
    for batch in batches:
        labels = batch.pop("labels")
        loss = ((reference(**batch).logits[:, 0] - labels) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        # The sum over two halves of a batch is rounded otherwise than its mean, and AdamW divides by small gradients.
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_score_equals_the_metrics_of_scipy(bert):
    task = tasks.from_frame(table())
    model = models.load(bert, task=task)
    rows = task.split("train")
    encoded = task.encode(models.processor(model), rows)
    score = evaluate(model, encoded, metrics=tuple(map(ls.metrics.get, ("pearson", "spearman", "mse"))))
    inputs = encoded.batch(range(len(rows)))
    loss = model(**inputs).loss
    predicted = model(**inputs).logits[:, 0].detach().double().numpy()
    answers = rows["label"].to_numpy()
    assert score.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert score.values["mse"] == score.loss
    assert score.values["pearson"] == pytest.approx(stats.pearsonr(predicted, answers).statistic, abs=1e-5)
    assert score.values["spearman"] == pytest.approx(stats.spearmanr(predicted, answers).statistic, abs=1e-6)
    assert not ls.metrics.get("mse").higher_is_better


def test_run_is_scored_again_from_its_values(bert, tmp_path):
    task = tasks.from_frame(table().assign(group=["a", "b"] * 30))
    settings = {"steps": 3, "batch_size": 4, "progress": False, "metric": ("pearson", "mse")}
    run = ls.train(models.load(bert, task=task), task, ls.LoRA(rank=2), out=tmp_path / "run", **settings)
    stored = ls.load(run.path)
    assert {name: str(dtype) for name, dtype in stored.predictions.dtypes.items()} == {
        "nll": "float32",
        "predicted": "float32",
    }
    assert stored.score.name == "pearson"
    for name, value in stored.score.values.items():
        assert ls.score(stored, task, name).value == pytest.approx(value, abs=1e-12)
    assert ls.score(stored, task).name == "mse"
    assert ls.score(stored, task).low < stored.score.values["mse"] < ls.score(stored, task).high


def test_metrics_of_classes_do_not_fit_numbers(bert, tmp_path):
    task = tasks.from_frame(table())
    with pytest.raises(
        ValueError, match=r"^cannot compute f1 of table: its labels are numbers; use pearson, .* or mse$"
    ):
        ls.train(models.load(bert, task=task), task, "lora", steps=1, out=tmp_path / "run", metric="f1")


def test_neurons_are_not_probed_without_classes(bert, tmp_path):
    task = tasks.from_frame(table())
    method = ls.NeFT(select_by="probed")
    with pytest.raises(ValueError, match=r"^cannot use select_by='probed' without classes"):
        ls.train(models.load(bert, task=task), task, method, steps=1, out=tmp_path / "run", progress=False)
