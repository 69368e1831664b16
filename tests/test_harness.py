"""Tests of lm-eval on an adapted model: its scores equal those of the stored choices, and the result is stored."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_multiple_choice import byte_gpt2, table  # noqa: F401, the fixture

import lorascope as ls
from lorascope.inputs import models, tasks
from lorascope.runs.folders import remove_run
from lorascope.runs.run import Run

METRICS = {"acc": "choice_accuracy", "acc_norm": "choice_accuracy_norm", "acc_bytes": "choice_accuracy_bytes"}


@pytest.fixture(scope="module")
def run(byte_gpt2, tmp_path_factory) -> Run:  # noqa: F811
    settings = {"steps": 4, "batch_size": 8, "progress": False, "lr": 3e-2, "eval_every": 2}
    folder = tmp_path_factory.mktemp("runs") / "run"
    return ls.train(models.load(byte_gpt2), tasks.from_frame(table(240)), ls.LoRA(rank=2), out=folder, **settings)


@pytest.fixture
def include_path(tmp_path) -> Path:
    """Folder with a task of lm-eval on the test rows."""
    folder = tmp_path / "harness-tasks"
    folder.mkdir()
    rows = tasks.from_frame(table(240)).split("test")
    rows.to_json(folder / "quiz.jsonl", orient="records", lines=True)
    lines = [
        "task: lorascope_quiz",
        "dataset_path: json",
        "dataset_kwargs:",
        f"  data_files: {{test: {folder / 'quiz.jsonl'}}}",
        "test_split: test",
        "output_type: multiple_choice",
        'doc_to_text: "{{prompt}}"',
        'doc_to_choice: "{{choices}}"',
        'doc_to_target: "{{answer}}"',
        "metric_list:",
        *(f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}" for name in METRICS),
    ]
    (folder / "quiz.yaml").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_scores_of_lm_eval_equal_those_of_the_run(run, include_path, no_network):
    pytest.importorskip("lm_eval")
    task = tasks.from_frame(table(240))
    result = ls.harness(run, ["lorascope_quiz"], num_fewshot=0, include_path=include_path)
    assert set(result["task"]) == {"lorascope_quiz"}
    values = dict(zip(result["metric"], result["value"], strict=True))
    expected = {name: ls.score(run, task, ours).value for name, ours in METRICS.items()}
    assert values == pytest.approx(expected, abs=1e-12)
    assert len(set(values.values())) > 1
    assert set(result["rows"]) == {len(task.split("test"))}
    assert set(result["num_fewshot"]) == {0}
    share = values["acc"]
    # Standard error of a mean of zeros and ones.
    error = np.sqrt(share * (1 - share) / (len(task.split("test")) - 1))
    assert result.set_index("metric")["stderr"]["acc"] == pytest.approx(error)


def test_result_is_stored_and_removed_with_the_run(run, include_path, no_network, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    copy = run.save(tmp_path / "run")
    before = set(Path(copy.path).glob("harness/*.json"))
    arguments = {"num_fewshot": 0, "limit": 5, "include_path": include_path}
    first = ls.harness(copy, ["lorascope_quiz"], **arguments)
    assert set(first["rows"]) == {5}
    (file,) = set(Path(copy.path).glob("harness/*.json")) - before
    assert json.loads(file.read_text())["call"]["limit"] == 5
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    pd.testing.assert_frame_equal(ls.harness(Run.read(copy.path), ["lorascope_quiz"], **arguments), first)
    with pytest.raises(ModuleNotFoundError):
        ls.harness(copy, ["lorascope_quiz"], overwrite=True, **arguments)
    remove_run(Path(copy.path))
    assert not Path(copy.path).exists()


def test_unknown_task_suggests_a_name(run):
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match=r"^unknown task of lm-eval 'helaswag'; did you mean 'hellaswag'"):
        ls.harness(run, ["helaswag"])


def test_model_of_an_adapter_on_the_embedding_stays_the_same(byte_gpt2, tmp_path):  # noqa: F811
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    settings = {"steps": 2, "batch_size": 4, "progress": False, "lr": 1e-2, "out": tmp_path / "run"}
    model = models.load(byte_gpt2)
    ls.train(model, tasks.from_frame(table()), ls.LoRA(rank=2, targets=("q", "embed")), **settings)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model.eval()(ids).logits
        huggingface.HFLM(pretrained=model, tokenizer=models.processor(model))  # ties weights
        assert torch.equal(model(ids).logits, before)


def test_missing_package_names_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"^ls.harness requires lm-eval: pip install 'lorascope\[harness\]'$"):
        ls.harness(run, ["mmlu"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"tasks": "mmlu"}, "tasks must be a list of names of lm-eval, such as ['mmlu'], got 'mmlu'"),
        ({"tasks": []}, "tasks must be a list of names of lm-eval, such as ['mmlu'], got []"),
        ({"tasks": ["mmlu"], "num_fewshot": -1}, "num_fewshot must be an integer >= 0, got -1"),
        ({"tasks": ["mmlu"], "limit": 0}, "limit must be an integer >= 1, got 0"),
        ({"tasks": ["mmlu"], "batch_size": "auto"}, "batch_size must be an integer >= 1, got 'auto'"),
        ({"tasks": ["mmlu"], "state": "first"}, "state must be one of 'last', 'best', got 'first'"),
    ],
)
def test_invalid_arguments_raise_one_line(run, arguments, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ls.harness(run, **arguments)


def test_classifier_cannot_be_evaluated(bert, reviews, tmp_path):
    settings = {"steps": 1, "batch_size": 4, "progress": False, "eval_size": 8, "test_size": 8}
    run = ls.train(models.load(bert, task=reviews), reviews, ls.LoRA(rank=2), out=tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=f"^cannot evaluate run {run.id} with lm-eval: its head is a classifier"):
        ls.harness(run, ["mmlu"])
