"""Tests of train(metric=): values by step, selection of the best state, identity, sweeps and the command line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sklearn.metrics

import lorascope as ls
from lorascope.experiments import grid
from lorascope.inputs import models, tasks
from lorascope.inputs.metrics import Metric
from lorascope.methods import Full
from lorascope.runs.run import Run
from lorascope.training.settings import Settings

FAST = {"steps": 6, "batch_size": 8, "eval_every": 2, "eval_size": 32, "progress": False, "device": "cpu"}


def wrong(predicted, answers) -> float:
    return np.mean(predicted != answers)


ERRORS = Metric("errors", "classes", False, wrong)


def train(bert, task, folder, **settings) -> Run:
    method = Full(lr=1e-3, head_lr=1e-2)
    return ls.train(models.load(bert, task=task), task, method, out=folder, **FAST | settings)


def course(run: Run, quantity: str) -> list[float]:
    return run.table[run.table["quantity"] == quantity].sort_values("step")["value"].tolist()


@pytest.fixture(scope="module")
def runs(bert, task, tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    arguments = {"plain": None, "f1": ("f1", "accuracy"), "errors": [ERRORS, "matthews_correlation"]}
    return {name: train(bert, task, folder / name, metric=metric) for name, metric in arguments.items()}


def test_metrics_are_recorded_by_step_and_equal_scikit_learn_at_the_end(runs, task):
    run = runs["f1"]
    assert len(course(run, "eval_f1")) == 4
    assert course(run, "eval_f1") == course(run, "eval_metric")
    assert course(run, "eval_accuracy") == course(runs["plain"], "eval_metric")
    test = task.split("test")
    answers = (test["label"] == "positive").astype(int)
    expected = sklearn.metrics.f1_score(answers, run.predictions["predicted"])
    assert (run.score.name, run.score.metric) == ("f1", expected)
    assert run.score.values == {"f1": expected, "accuracy": runs["plain"].score.metric}
    assert course(run, "test_f1") == course(run, "test_metric") == [expected]
    groups = {
        name: sklearn.metrics.f1_score(answers[rows.index], run.predictions["predicted"][rows.index])
        for name, rows in test.groupby("group")
    }
    assert run.score.groups == pytest.approx(groups)


def test_first_metric_selects_the_best_state_in_its_direction(runs):
    for name, sign in {"f1": 1, "errors": -1}.items():
        run = runs[name]
        table = run.table[run.table["quantity"] == "eval_metric"].set_index("step")["value"].loc[2:] * sign
        losses = run.table[run.table["quantity"] == "eval_loss"].set_index("step")["value"].loc[2:]
        assert run.meta.states["best"].step == max(table.index, key=lambda step: (table[step], -losses[step]))
    assert runs["errors"].score.lower_is_better
    assert runs["errors"].score.metric == pytest.approx(1 - runs["plain"].score.metric)


def test_metric_that_is_nan_never_selects_a_state(bert, task, tmp_path):
    values = iter([math.nan, math.nan, 0.2, 0.1, 0.3])
    own = Metric("own", "classes", True, lambda predicted, answers: next(values))
    # Step 0, 2, 4 and 6, then the test split.
    grouped = tasks.from_frame(task.table[["text", "label"]], "no groups")
    run = train(bert, grouped, tmp_path / "run", metric=own)
    assert run.meta.states["best"].step == 4
    assert Run.read(run.path).score.values == {"own": 0.3}
    never = Metric("never", "classes", True, lambda predicted, answers: math.nan)
    run = train(bert, task, tmp_path / "never", metric=never)
    assert list(run.meta.states) == ["last"]
    assert math.isnan(Run.read(run.path).score.metric)


def test_metrics_change_the_id_and_a_run_without_them_stores_nothing_about_them(runs):
    assert len({run.id for run in runs.values()}) == 3
    content = json.loads((runs["plain"].path / "run.json").read_text(encoding="utf-8"))
    assert "metric" not in content["settings"]
    assert content["test"].keys() == {"name", "metric", "loss", "groups"}
    rates = {"steps": 1, "lr": 0.1, "head_lr": 0.1}
    one, listed = Settings(**rates, metric="f1"), Settings(**rates, metric=["f1"])
    assert one.to_dict() == listed.to_dict()
    assert one.to_dict()["metric"] == ["f1"]


def test_metrics_do_not_change_the_training(runs):
    for name in ("f1", "errors"):
        assert course(runs[name], "loss") == course(runs["plain"], "loss")


def test_finished_run_with_metrics_is_returned(runs, bert, task):
    run = train(bert, task, runs["f1"].path, metric=["f1", "accuracy"])
    assert run.id == runs["f1"].id


def test_fork_keeps_the_metrics_of_its_trunk(bert, task, tmp_path):
    trunk = train(bert, task, tmp_path / "run", metric=("f1", "accuracy"), keep_checkpoints=(2,))
    fork = ls.fork(trunk, models.load(bert, task=task), task, step=2, device="cpu", progress=False)
    assert fork.score == trunk.score


def test_invalid_metric_is_rejected_before_training(bert, task, tmp_path):
    with pytest.raises(ValueError, match=r"^unknown metric 'mcc'; did you mean 'matthews_correlation'\?$"):
        train(bert, task, tmp_path / "run", metric="mcc")
    with pytest.raises(ValueError, match=r"^cannot compute mse of toy: its labels are 2 classes; use accuracy, f1, "):
        train(bert, task, tmp_path / "run", metric=("f1", "mse"))
    assert not (tmp_path / "run").exists()


def test_grid_takes_a_sequence_of_metrics_as_one_value(task):
    settings = {"steps": 2, "metric": ["f1", "accuracy"]}
    sweep = {"task": task, "method": "lora", "seeds": 1, "settings": settings}
    assert [combination["metric"] for combination in grid.read(sweep).settings] == [["f1", "accuracy"]]
    settings["metric"] = "mse"
    with pytest.raises(ValueError, match=r"^cannot compute mse of toy"):
        grid.read(sweep)
    settings["metric"] = "f1_macr"
    with pytest.raises(ValueError, match=r"^unknown metric 'f1_macr'; did you mean 'f1_macro'"):
        grid.read(sweep)


def test_sweep_trains_with_metrics_in_worker_processes(bert, task, tmp_path):
    swept = ls.sweep(bert, task, Full(), seeds=1, jobs=1, root=tmp_path, metric=(ERRORS, "f1"), **FAST)
    assert list(swept[0].score.values) == ["errors", "f1"]


def test_command_line_takes_several_metrics(bert, task, tmp_path, capsys):
    from lorascope.cli.main import main

    table = tmp_path / "toy.csv"
    task.table[["text", "label"]].to_csv(table, index=False)
    words = ["train", "full", "--model", bert, "--task", str(table), "--steps", "2", "--no-progress", "--json"]
    assert main([*words, "-o", str(tmp_path / "run"), "--metric", "f1", "accuracy"]) == 0
    assert list(json.loads(capsys.readouterr().out)["test"]["values"]) == ["f1", "accuracy"]
