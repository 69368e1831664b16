"""Sweeps: order, skipping, failures that lose nothing, and a worker that is killed."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from joblib import cpu_count, parallel_config

import lorascope as ls
from lorascope import models
from lorascope.methods import Full, LoRA
from lorascope.sweeps import width

FAST = {"steps": 3, "batch_size": 4, "eval_every": 0, "progress": False}


class Fragile:
    """Makes a model; the first call of all kills its own process."""

    def __init__(self, folder: str, marker: Path) -> None:
        self.folder, self.marker = folder, marker

    def __call__(self):
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return models.load(self.folder)
        os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """A model that costs its process its life."""

    def __call__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def csv(task, path: Path) -> str:
    task.table[["text", "label"]].to_csv(path / "toy.csv", index=False)
    return str(path / "toy.csv")


def test_runs_come_method_by_method_in_the_order_of_seeds(bert, task, tmp_path):
    methods = [Full(), LoRA(rank=2)]
    runs = ls.sweep(bert, task, methods, seeds=[3, 1], jobs=1, root=tmp_path, **FAST)
    assert [(run.meta["method"]["name"], run.meta["seed"]) for run in runs] == [
        ("full", 3), ("full", 1), ("lora", 3), ("lora", 1),
    ]  # fmt: skip
    assert all(run.finished for run in runs)
    assert ls.plots.update_norm(runs).data["n"].eq(2).any()  # seeds of one recipe make one band


def test_what_is_finished_is_not_trained_again(bert, task, tmp_path):
    first = ls.sweep(bert, task, LoRA(), seeds=1, jobs=1, root=tmp_path, **FAST)
    stamp = (first[0].path / "run.json").stat().st_mtime_ns
    both = ls.sweep(bert, task, LoRA(), seeds=2, jobs=1, root=tmp_path, **FAST)
    assert both[0].id == first[0].id
    assert (first[0].path / "run.json").stat().st_mtime_ns == stamp


def test_a_run_that_fails_loses_none_of_the_others(bert, task, tmp_path):
    methods = [LoRA(), LoRA(targets="nowhere")]
    with pytest.raises(
        RuntimeError, match=r"1 of 2 runs failed.*targets nowhere, seed 0: .*'nowhere' matches no module"
    ):
        ls.sweep(bert, task, methods, seeds=1, jobs=1, root=tmp_path, **FAST)
    (kept,) = tmp_path.glob("*/run.json")
    assert ls.load(kept.parent).finished


@dataclass(kw_only=True)
class Careless(LoRA):
    """Fails in a way that nobody foresaw."""

    def before_step(self, step):
        assert step.index == 0


def test_an_error_that_nobody_foresaw_loses_none_of_the_others(bert, task, tmp_path):
    with pytest.raises(RuntimeError, match=r"1 of 3 runs failed.*Careless.*: AssertionError"):
        ls.sweep(bert, task, [LoRA(), Careless(), Full()], seeds=1, jobs=1, root=tmp_path, **FAST)
    assert sorted(ls.load(path.parent).finished for path in tmp_path.glob("*/run.json")) == [False, True, True]


def test_the_configured_width_is_taken():
    assert width() == cpu_count()
    with parallel_config("loky", n_jobs=3):
        assert width() == 3


def test_a_worker_that_always_dies_is_told(bert, task, tmp_path):
    with pytest.raises(RuntimeError, match=r"killed 3 times in a row.*Not finished: LoRA, seed 0"):
        ls.sweep(Dying(), csv(task, tmp_path), LoRA(), seeds=1, jobs=2, root=tmp_path, **FAST)


def test_a_killed_worker_costs_no_run(bert, task, tmp_path):
    model = Fragile(bert, tmp_path / "killed-once")
    runs = ls.sweep(model, csv(task, tmp_path), LoRA(), seeds=2, jobs=2, root=tmp_path / "runs", **FAST)
    assert model.marker.exists()
    assert [run.finished for run in runs] == [True, True]
