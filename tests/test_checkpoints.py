"""Tests of resuming after kills, Ctrl-C, full disks and damaged checkpoints: the same call gives the same run."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import killing
import numpy as np
import pytest
import torch
from forks import contents, same

import lorascope as ls
from lorascope.inputs import models
from lorascope.methods import LoRA
from lorascope.runs.folders import lock_run
from lorascope.training.keyboard_interrupt import catch_interrupt
from lorascope.training.session import Session
from lorascope.training.state import load_tree, save_tree


def check_not_mistaken_for_finished(folder: Path, whole: Path) -> None:
    """Check that a folder whose table opens has the same content as the finished run."""
    try:
        table = ls.load(folder).table
    except (ValueError, FileNotFoundError) as error:
        table, line = None, str(error)
    if table is None:
        assert "\n" not in line
    else:
        found = contents(folder)
        assert {name: found[name] for name in contents(whole)} == contents(whole)


@pytest.mark.parametrize(
    ("method", "every"),
    [
        ("two phases", 7),
        ("growing", 7),
        *(pytest.param(method, 1, marks=pytest.mark.slow) for method in killing.METHODS),
    ],
)
def test_run_killed_at_any_change_of_its_folder_resumes_bitwise(method, every, forks, tmp_path):
    """Copies of the folder amid (every 7th of) its writes and before removals equal what a kill would leave."""
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    assert forks(method, whole, copies=copies) == 0
    moments = sorted(copies.iterdir())
    assert len(moments) > 10
    # Fewer moments where a run has more phases, or, as AdaLoRA, writes at the same moments as other methods.
    moments = moments[:: every * {"two phases": 2, "adalora": 4}.get(method, 1)]
    for copy in moments:
        check_not_mistaken_for_finished(copy, whole)
        assert forks(method, copy) == 0
        same(copy, whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["two phases", "growing", "residual", "adalora"])
def test_run_killed_repeatedly_ends_bitwise_equal(method, forks, tmp_path):
    """SIGKILL in the middle of writes and at random times, until a call completes."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    start = time.monotonic()
    assert forks(method, whole) == 0
    length = time.monotonic() - start
    draw = random.Random(method)
    jobs = [{"kill at": draw.randrange(3, 9)} for _ in range(3)]
    jobs += [{"seconds": draw.uniform(0.2, 0.9) * length} for _ in range(3)]
    outcomes = [forks(method, out, **job) for job in jobs]
    assert outcomes[:2] == [-signal.SIGKILL] * 2
    assert set(outcomes) <= {0, -signal.SIGKILL}
    assert forks(method, out) == 0
    same(out, whole)


FAST = killing.SETTINGS | {"observe": killing.observers()}


@pytest.fixture(scope="module")
def whole(bert, task, tmp_path_factory) -> Path:
    """Return the folder of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted") / "whole"
    ls.train(models.load(bert, task=task), task, killing.METHODS["lora"], out=out, **FAST)
    return out


@pytest.fixture
def at_step(monkeypatch):
    """Return a function that schedules one call at the start of a step of LoRA."""

    def plan(index, act):
        waiting = [act]

        def before_step(self, step):
            if step.index == index and waiting:
                waiting.pop()()

        monkeypatch.setattr(LoRA, "before_step", before_step)

    return plan


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("index", [0, 2, 4])
@pytest.mark.parametrize("fresh", [True, False], ids=["a fresh model", "the same module"])
def test_ctrl_c_finishes_the_step_and_the_same_call_resumes(index, fresh, whole, bert, task, tmp_path, at_step):
    out, model, method = tmp_path / "out", models.load(bert, task=task), killing.METHODS["lora"]
    at_step(index, press)
    before = signal.getsignal(signal.SIGINT)  # in a background job it is ignored
    with pytest.raises(KeyboardInterrupt, match=f"step {index + 1} of 5; .*the same call"):
        ls.train(model, task, method, out=out, **FAST)
    assert signal.getsignal(signal.SIGINT) is before
    assert [file.stem for file in out.glob("resume/step-*")] == [f"step-{index + 1:08d}"]
    with pytest.raises(FileNotFoundError, match=r"not in .*the same call of ls.train"):
        ls.load(out).table  # noqa: B018
    done = []
    at_step(index, lambda: done.append("again"))
    run = ls.train(models.load(bert, task=task) if fresh else model, task, method, out=out, **FAST)
    assert not done
    assert run.finished
    same(out, whole)


def test_second_ctrl_c_interrupts_at_once_and_the_run_resumes(bert, whole, task, tmp_path, at_step):
    out, method = tmp_path / "out", killing.METHODS["lora"]
    at_step(3, lambda: (press(), press()))
    with pytest.raises(KeyboardInterrupt) as caught:
        ls.train(models.load(bert, task=task), task, method, out=out, **FAST)
    assert str(caught.value) == ""
    ls.train(models.load(bert, task=task), task, method, out=out, **FAST)
    same(out, whole)


@pytest.mark.parametrize("write", range(0, 14, 2))
def test_full_disk_raises_one_line_and_the_run_resumes(write, whole, bert, task, tmp_path, monkeypatch):
    out, method = tmp_path / "out", killing.METHODS["lora"]
    model = models.load(bert, task=task)
    left = [write]

    def fill(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fill)
        with pytest.raises(OSError, match=r"cannot write .*No space left on device") as caught:
            ls.train(model, task, method, out=out, **FAST)
    assert "\n" not in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert not list(out.rglob(".*"))
    check_not_mistaken_for_finished(out, whole)
    ls.train(model, task, method, out=out, **FAST)
    same(out, whole)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "nonsense"])
def test_damaged_checkpoint_warns_and_is_not_used(damage, whole, bert, task, tmp_path, at_step):
    out, method = tmp_path / "out", killing.METHODS["lora"]
    at_step(3, press)
    with pytest.raises(KeyboardInterrupt):
        ls.train(models.load(bert, task=task), task, method, out=out, **FAST)
    (file,) = out.glob("resume/step-*")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    wrong = {"cut short": data[:-1000], "one bit": data, "empty": b"", "nonsense": b"nonsense" * 100}
    file.write_bytes(wrong[damage])
    done = []
    at_step(0, lambda: done.append("from the beginning"))
    with pytest.warns(UserWarning, match="step-00000004.*earlier step"):
        ls.train(models.load(bert, task=task), task, method, out=out, **FAST)
    assert done
    same(out, whole)


@pytest.fixture
def stopped(bert, task, tmp_path, at_step):
    """Return the folder of a run that was stopped after its fourth step, and its only checkpoint."""
    out = tmp_path / "out"
    at_step(3, press)
    with pytest.raises(KeyboardInterrupt):
        ls.train(models.load(bert, task=task), task, killing.METHODS["lora"], out=out, **FAST)
    (file,) = out.glob("resume/step-*")
    return out, file


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", ...), ("table", ...), ("frozen", 3), ("seconds", "1"), ("finished", -1), ("best", {"step": 1})],
)
def test_invalid_checkpoint_with_a_valid_checksum_warns_and_is_not_used(key, value, stopped, whole, bert, task):
    out, file = stopped
    tree = load_tree(file)
    save_tree(file, {name: part for name, part in (tree | {key: value}).items() if part is not ...})
    with pytest.warns(UserWarning, match="step-00000004.*earlier step"):
        ls.train(models.load(bert, task=task), task, killing.METHODS["lora"], out=out, **FAST)
    same(out, whole)


@pytest.mark.parametrize(
    "forged", [{"optimizer": {}}, {"optimizer": {"groups": 1, "state": {}}}, {"generators": {}}, {"observers": [1]}]
)
def test_checkpoint_that_does_not_fit_the_run_raises_one_line(forged, stopped, bert, task):
    out, file = stopped
    save_tree(file, load_tree(file) | forged)
    with pytest.raises(ValueError, match="checkpoint of step 4") as caught:
        ls.train(models.load(bert, task=task), task, killing.METHODS["lora"], out=out, **FAST)
    assert str(caught.value).isprintable()


def test_best_state_after_the_last_checkpoint_is_dropped_on_resume(bert, task, tmp_path, at_step, monkeypatch):
    """On another machine, the repeated steps may find no better state; then the earlier one is the best."""
    out, method = tmp_path / "out", LoRA(rank=2)
    states = {}
    score, worse = Session._score, []

    def judged(self, rows):
        result = score(self, rows)
        if rows is not self.validation:
            return result
        states[self.step.finished] = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        good = {0: 0, 2: 6, 4: 1 if worse else 7, 5: 0}[self.step.finished]
        return replace(result, correct=np.arange(len(result.nll)) < good)

    monkeypatch.setattr(Session, "_score", judged)
    at_step(4, lambda: (press(), press()))
    with pytest.raises(KeyboardInterrupt):
        ls.train(models.load(bert, task=task), task, method, out=out, **FAST | {"checkpoint_every": 3})
    worse.append("now")
    run = ls.train(models.load(bert, task=task), task, method, out=out, **FAST | {"checkpoint_every": 3})
    assert run.meta.states["best"].step == 2
    assert sorted(path.stem for path in out.glob("snapshots/*")) == [
        "step-000000",
        "step-000002",
        "step-000004",
        "step-000005",
    ]
    model = models.load(bert, task=task)
    run.restore(model, state="best")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, states[2][name]), name


def test_a_folder_in_use_is_refused(bert, task, tmp_path):
    with lock_run(tmp_path / "out"), pytest.raises(ValueError, match="is being trained by another process"):
        ls.train(models.load(bert, task=task), task, LoRA(), out=tmp_path / "out", **FAST)
    ls.train(models.load(bert, task=task), task, LoRA(), out=tmp_path / "out", **FAST)


def test_error_for_an_unfinished_recipe_names_its_phase(bert, task, tmp_path, at_step):
    at_step(1, press)
    with pytest.raises(KeyboardInterrupt):
        ls.train(models.load(bert, task=task), task, killing.METHODS["two phases"], out=tmp_path / "out", **FAST)
    with pytest.raises(ValueError, match="out: it is running, in phase 2-retrain; the same call of train"):
        ls.load(tmp_path / "out")
    assert ls.load(tmp_path / "out/1-search").finished


def test_overwrite_replaces_the_run(whole, bert, task, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    run = ls.train(models.load(bert, task=task), task, killing.METHODS["lora"], out=out, overwrite=True, **FAST)
    assert run.finished
    assert list(tmp_path.iterdir()) == [out]


def test_files_of_the_user_survive_overwrite_and_resume(bert, task, tmp_path, at_step):
    out, method = tmp_path / "out", killing.METHODS["lora"]
    at_step(3, press)
    with pytest.raises(KeyboardInterrupt):
        ls.train(models.load(bert, task=task), task, method, out=out, **FAST)
    mine = [out / "notes.txt", *(out / place / "mine.safetensors" for place in ("resume", "snapshots", "state"))]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("years of work")
    with pytest.raises(ValueError, match=r"(mine.safetensors|notes.txt) is not a file of this run"):
        ls.train(models.load(bert, task=task), task, method, out=out, overwrite=True, **FAST)
    run = ls.train(models.load(bert, task=task), task, method, out=out, **FAST)
    assert run.finished
    assert [file.read_text(encoding="utf-8") for file in mine] == ["years of work"] * 4
    assert not any("mine" in name for name in run.meta.checksums)
    assert [path.name for path in (out / "resume").iterdir()] == ["mine.safetensors"]


def test_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
    try:
        with catch_interrupt() as pressed:
            signal.raise_signal(signal.SIGINT)
        assert not pressed.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
