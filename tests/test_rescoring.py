"""Tests of ls.score: metrics of stored predictions against scikit-learn, and intervals with a known width."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from hostile import sign

import lorascope as ls
from lorascope.inputs import models, tasks
from lorascope.inputs.metrics import Metric
from lorascope.methods import Full
from lorascope.runs.run import Run

FAST = {"steps": 4, "batch_size": 8, "eval_every": 0, "eval_size": 16, "progress": False, "device": "cpu"}


def train(bert, task, folder, **settings) -> Run:
    return ls.train(models.load(bert, task=task), task, Full(lr=1e-3, head_lr=1e-2), out=folder, **FAST | settings)


def predict(run: Run, folder, table: pd.DataFrame) -> Run:
    """Return a copy of a run with other predictions."""
    shutil.copytree(run.path, folder)
    table.to_parquet(folder / "predictions.parquet", index=False)
    sign(folder)
    return Run.read(folder)


def predictions(predicted: np.ndarray, answers: np.ndarray) -> pd.DataFrame:
    margins = np.where(predicted == answers, 5, -5).astype(np.int8)
    nll = np.zeros(len(answers), np.float16)
    return pd.DataFrame({"margin": margins, "nll": nll, "predicted": predicted.astype(np.int16)})


@pytest.fixture(scope="module")
def run(bert, task, tmp_path_factory) -> Run:
    return train(bert, task, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def answers(task) -> np.ndarray:
    return (task.split("test")["label"] == "positive").to_numpy().astype(int)


def test_metrics_of_stored_predictions_equal_scikit_learn(run, task, answers, tmp_path):
    draw = np.random.default_rng(0)
    predicted = np.where(draw.random(len(answers)) < 0.3, 1 - answers, answers)
    changed = predict(run, tmp_path / "run", predictions(predicted, answers))
    for name, value in {
        "accuracy": sklearn.metrics.accuracy_score(answers, predicted),
        "f1": sklearn.metrics.f1_score(answers, predicted),
        "f1_macro": sklearn.metrics.f1_score(answers, predicted, average="macro"),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(answers, predicted),
    }.items():
        scored = ls.score(changed, task, name, bootstrap=20)
        assert (scored.name, scored.value, scored.units) == (name, value, len(answers))
        assert scored.low < value < scored.high
    # The margins of two classes give the classes, for runs of an earlier version.
    old = predict(run, tmp_path / "old", predictions(predicted, answers)[["margin", "nll"]])
    assert ls.score(old, task, "f1", bootstrap=0).value == sklearn.metrics.f1_score(answers, predicted)


def test_default_is_the_accuracy_of_the_run(run, task):
    assert ls.score(run, task, bootstrap=0)[:2] == ("accuracy", run.score.metric)
    assert all(map(math.isnan, ls.score(run, task, bootstrap=0)[2:4]))


def test_score_uses_the_first_test_rows_of_test_size(bert, task, tmp_path):
    small = train(bert, task, tmp_path / "run", test_size=20)
    scored = ls.score(small, task, bootstrap=0)
    assert (scored.value, scored.units) == (small.score.metric, 20)


def test_interval_over_rows_is_that_of_a_binomial(run, task, answers, tmp_path):
    predicted = answers.copy()
    predicted[: len(answers) // 4] = 1 - predicted[: len(answers) // 4]
    scored = ls.score(predict(run, tmp_path / "run", predictions(predicted, answers)), task, bootstrap=4000)
    p, n = scored.value, len(answers)
    expected = 2 * 1.96 * math.sqrt(p * (1 - p) / n)
    assert scored.high - scored.low == pytest.approx(expected, rel=0.1)
    assert scored == ls.score(predict(run, tmp_path / "copy", predictions(predicted, answers)), task, bootstrap=4000)


def test_interval_over_clusters_resamples_all_rows_of_a_cluster(run, task, tmp_path):
    # All rows of a cluster are right, or all are wrong: the n rows are as many as their clusters.
    table = task.table[["text", "label", "group"]].assign(cluster=[f"c{number // 6}" for number in range(300)])
    clustered = tasks.from_frame(table, "toy")
    assert clustered.hash == task.hash
    test = clustered.split("test")
    answers = (test["label"] == "positive").to_numpy().astype(int)
    numbers = pd.factorize(test["cluster"])[0]
    predicted = np.where(numbers % 3 == 0, 1 - answers, answers)
    changed = predict(run, tmp_path / "run", predictions(predicted, answers))
    scored = ls.score(changed, clustered, bootstrap=2000)
    assert scored.units == numbers.max() + 1
    by_cluster = pd.Series(predicted == answers).groupby(numbers).agg(["sum", "size"])
    draw = np.random.default_rng(5)
    means = []
    for _ in range(2000):
        sample = by_cluster.iloc[draw.integers(len(by_cluster), size=len(by_cluster))]
        means.append(sample["sum"].sum() / sample["size"].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    assert (scored.low, scored.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))


def test_own_metric_is_computed(run, task, answers):
    own = Metric("positives", "classes", True, lambda predicted, answers: np.sum(answers))
    assert ls.score(run, task, own, bootstrap=0).value == answers.sum()


def test_invalid_calls_raise_one_line(run, bert, task, tmp_path):
    other = tasks.from_frame(task.table[["text", "label"]].iloc[::2], "other")
    with pytest.raises(ValueError, match=r"^task must be the data of run \w{12}, toy, got other with different rows$"):
        ls.score(run, other)
    with pytest.raises(ValueError, match=r"^cannot compute mse of toy: its labels are 2 classes; use accuracy"):
        ls.score(run, task, "mse")
    with pytest.raises(ValueError, match=r"^bootstrap must be an integer >= 0, got -1$"):
        ls.score(run, task, bootstrap=-1)
    table = task.table[["text", "label"]].copy()
    table.loc[::5, "label"] = "mixed"
    three = tasks.from_frame(table, "three")
    trained = train(bert, three, tmp_path / "three")
    old = predict(trained, tmp_path / "old", trained.predictions[["margin", "nll"]])
    with pytest.raises(ValueError, match=r"^cannot score run \w{12}: its predictions have no classes\. Train the run "):
        ls.score(old, three, "f1_macro")
