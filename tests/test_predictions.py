"""Tests of predictions per test row: their margins, their losses and their file in the run folder."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch

import lorascope as ls
from lorascope.files.predictions import predict_classes, quantize_margins
from lorascope.inputs import models, tasks
from lorascope.methods import Full
from lorascope.runs.run import Run
from lorascope.training.evaluation import Score

FAST = {"steps": 4, "batch_size": 8, "eval_every": 0, "eval_size": 16, "progress": False, "device": "cpu"}
FILE = "predictions.parquet"


def test_margins_round_away_from_zero_and_clip() -> None:
    logits = np.array([[1.0, 1.001], [1.001, 1.0], [2.0, 2.0], [9.0, 0.0], [0.0, 0.5]])
    found = quantize_margins(logits, np.array([0, 0, 0, 0, 0]))
    assert found.tolist() == [-1, 1, 0, 127, -16]
    wide = np.random.default_rng(0).normal(size=(200, 4))
    labels = wide.argmax(1)
    labels[:50] = (labels[:50] + 1) % 4
    assert ((quantize_margins(wide, labels) > 0) == (wide.argmax(1) == labels)).all()


def test_margins_of_logits_that_are_not_finite_are_right_only_if_they_are_larger() -> None:
    logits = np.array([[np.nan, 1.0], [np.inf, np.inf], [np.inf, 1.0], [-np.inf, 1.0], [1.0, -np.inf]])
    assert quantize_margins(logits, np.zeros(5, dtype=np.int64)).tolist() == [0, 0, 127, -127, 127]


def test_predicted_class_is_right_exactly_if_the_margin_is_above_zero() -> None:
    logits = np.array([[1.0, 2.0, 2.0], [2.0, 2.0, 1.0], [3.0, 2.0, 1.0], [np.nan, 1.0, 2.0], [np.inf, np.inf, 0.0]])
    # A tie with the right class is an error, so it gives the other class of the tie.
    assert predict_classes(logits, np.array([0, 0, 0, 0, 0])).tolist() == [1, 1, 0, 2, 1]
    assert predict_classes(logits, np.array([1, 1, 1, 1, 1])).tolist() == [2, 0, 0, 0, 0]
    wide = np.random.default_rng(0).normal(size=(500, 4)).round(1)
    labels = np.random.default_rng(1).integers(4, size=500)
    predicted = predict_classes(wide, labels)
    assert predicted.dtype == np.int16
    np.testing.assert_array_equal(predicted == labels, quantize_margins(wide, labels) > 0)
    np.testing.assert_array_equal(np.take_along_axis(wide, predicted[:, None], 1)[:, 0], wide.max(axis=1))


def test_mean_loss_of_the_rows_is_the_loss_over_tokens() -> None:
    score = Score("perplexity", np.array([6.0, 1.0, 5.0]), np.array([3, 1, 2]), None, None)
    assert score.loss == 2.0
    # 3 rows in 6 tokens: every row is halved.
    assert score.predictions.to_dict("list") == {"nll": [3.0, 0.5, 2.5]}


def train(model: torch.nn.Module, task: tasks.Task, folder, **settings) -> Run:
    return ls.train(model, task, Full(lr=1e-2, head_lr=1e-2), out=folder, **FAST | settings)


def split(model: torch.nn.Module, task: tasks.Task, rows: int = 1000):
    """Return the first encoded rows of the test split as one batch, and the rows."""
    fitted = task.fit(model)
    encoded = fitted.encode(models.processor(model), fitted.split("test").head(rows))
    return encoded.batch(range(len(encoded))), encoded


def near_margins(found, expected) -> None:
    """Compare margins up to one step, because logits depend on the padding of a batch."""
    found, expected = (np.asarray(each, dtype=np.int64) for each in (found, expected))
    assert len(found) == len(expected)
    assert (abs(found - expected) <= 1).all()
    assert len(np.unique(found)) > 1


@pytest.fixture(scope="module")
def trained(bert, task, tmp_path_factory):
    model = models.load(bert, task=task)
    return model, train(model, task, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained[1].path, tmp_path / "run")


def test_predictions_of_a_classifier_equal_brute_force(trained, task):
    model, run = trained
    found = run.predictions
    batch, encoded = split(model, task)
    with torch.no_grad():
        logits = model(**batch).logits
    near_margins(found["margin"], quantize_margins(logits.numpy(), encoded.classes))
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none").numpy()
    np.testing.assert_allclose(found["nll"], losses, rtol=1e-3)
    assert (found["margin"] > 0).mean() == run.score.metric
    assert found["nll"].astype("float64").mean() == pytest.approx(run.score.loss, abs=1e-3)
    assert found["predicted"].tolist() == logits.argmax(1).tolist()
    assert found.dtypes.astype(str).to_dict() == {"margin": "int8", "nll": "float16", "predicted": "int16"}


def test_predicted_classes_of_three_give_the_metrics_of_scikit_learn(bert, task, tmp_path):
    table = task.table[["text", "label"]].copy()
    table.loc[table["text"].str.contains("poor|boring"), "label"] = "very negative"
    table.loc[::5, "label"] = "very negative"  # not learnable, so that some rows are wrong
    three = tasks.from_frame(table, "three")
    model = models.load(bert, task=three)
    run = train(model, three, tmp_path / "run", steps=40)
    batch, encoded = split(model, three)
    with torch.no_grad():
        expected = model(**batch).logits.argmax(1).numpy()
    answers, predicted = encoded.classes, run.predictions["predicted"].to_numpy()
    assert predicted.tolist() == expected.tolist()
    assert len(np.unique(expected)) > 1
    for name, value in {
        "accuracy": sklearn.metrics.accuracy_score(answers, expected),
        "f1_macro": sklearn.metrics.f1_score(answers, expected, average="macro"),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(answers, expected),
    }.items():
        assert ls.metrics.get(name).compute(predicted, answers) == value
    assert run.score.metric == sklearn.metrics.accuracy_score(answers, expected)


def test_predictions_of_an_earlier_version_have_no_classes(copied, trained):
    from hostile import sign

    old = trained[1].predictions[["margin", "nll"]]
    old.to_parquet(copied / FILE, index=False)
    sign(copied)
    pd.testing.assert_frame_equal(Run.read(copied).predictions, old)


def test_predictions_survive_in_the_folder_with_a_checksum(trained, copied, tmp_path):
    run = Run.read(copied)
    assert FILE in run.meta.checksums
    pd.testing.assert_frame_equal(run.predictions, trained[1].predictions)
    pd.testing.assert_frame_equal(run.save(tmp_path / "other").predictions, trained[1].predictions)


def test_predictions_cover_the_first_test_rows_of_test_size(bert, task, trained, tmp_path):
    model = models.load(bert, task=task)
    found = train(model, task, tmp_path / "run", test_size=7).predictions
    near_margins(found["margin"], trained[1].predictions["margin"].head(7))


def test_run_without_predictions_raises_one_line(copied):
    (copied / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"cannot read {FILE} of run"):
        Run.read(copied).predictions  # noqa: B018
    meta = json.loads((copied / "run.json").read_text(encoding="utf-8"))
    del meta["checksums"][FILE]
    (copied / "run.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"cannot read the predictions of run \w{12}: .*overwrite=True$"):
        Run.read(copied).predictions  # noqa: B018
    (copied / "run.json").write_text(json.dumps(meta | {"status": "running", "states": {}}), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"the same call of ls\.train resumes its run"):
        Run.read(copied).predictions  # noqa: B018


def test_file_of_other_columns_raises_one_line(copied):
    from hostile import sign

    pd.DataFrame({"margin": [1.5]}).to_parquet(copied / FILE, index=False)
    sign(copied)
    with pytest.raises(ValueError, match=f"{FILE}: columns must be margin .* got .*'margin': 'float64'"):
        Run.read(copied).predictions  # noqa: B018


def test_predictions_of_a_decoder_compare_the_choices(gpt2, task, tmp_path):
    model = models.load(gpt2)
    run = train(model, task, tmp_path / "run", test_size=20)
    batch, encoded = split(model, task, 20)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last = [row.nonzero()[0].item() - 1 for row in (batch["labels"] != -100)]  # predicts the only token of the response
    at = logits[torch.arange(20), last]
    right = at.gather(1, torch.tensor(encoded.choices.tokens)[encoded.choices.answers][:, None])[:, 0]
    wrong = at.gather(1, torch.tensor(encoded.choices.tokens)[1 - encoded.choices.answers][:, None])[:, 0]
    steps = 32 * (right - wrong).double()
    expected = (steps.sign() * steps.abs().ceil()).clip(-127, 127)
    near_margins(run.predictions["margin"], expected)
    answers = encoded.choices.answers
    assert run.predictions["predicted"].tolist() == np.where(expected > 0, answers, 1 - answers).tolist()
    np.testing.assert_allclose(run.predictions["nll"], at.logsumexp(1) - right, rtol=1e-3)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": [f"fine {'film ' * (n % 5)} {n}" for n in range(80)]},
        {"prompt": [f"film {n}" for n in range(80)], "response": ["very " * (n % 5) + "fine" for n in range(80)]},
    ],
    ids=["plain text", "open responses"],
)
def test_predictions_without_a_closed_set_average_to_the_loss(columns, gpt2, tmp_path):
    task = tasks.from_frame(pd.DataFrame(columns))
    run = train(models.load(gpt2), task, tmp_path / "run")
    assert list(run.predictions) == ["nll"]
    assert run.predictions["nll"].astype("float64").mean() == pytest.approx(run.score.loss, rel=1e-3)
    assert run.predictions["nll"].nunique() > 3


def test_predictions_of_an_earlier_attempt_are_removed(copied):
    from lorascope.runs.writer import RunWriter

    RunWriter(copied, Run.read(copied).meta).begin(None)
    assert not (copied / FILE).exists()
