"""Forks of a run: an empty one is the run bit by bit, one at step 0 a fresh training, and equal ones are equal."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forks import WALL_CLOCK
from killing import SETTINGS
from test_loop import unchecked

import lorascope as ls
from lorascope.cli.main import main
from lorascope.inputs import models, tasks
from lorascope.methods import METHODS, LoRA
from lorascope.training.session import Session

KEEP = SETTINGS | {"keep_checkpoints": (2, 3)}
LORA = LoRA(rank=3, targets="all-linear", dropout=0.2, lr=1e-2)


@pytest.fixture(scope="module")
def trunk(bert, task, tmp_path_factory) -> ls.Run:
    out = tmp_path_factory.mktemp("forks") / "trunk"
    return ls.train(models.load(bert, task=task), task, LORA, out=out, **KEEP)


@pytest.fixture
def fork(bert, task, tmp_path):
    """Return a function that forks a run on a fresh tiny BERT."""
    count = 0

    def make(run, step, **options):
        nonlocal count
        count += 1
        options = {"out": tmp_path / f"fork {count}", "device": "cpu", "progress": False} | options
        return ls.fork(run, models.load(bert, task=task), task, step=step, **options)

    return make


def trained_bits(run: ls.Run) -> dict[str, bytes]:
    """Return every tensor that training changed, as bytes."""
    return {name: np.asarray(array).tobytes() for name, array in run.tensors().items()}


def require_equal(run: ls.Run, other: ls.Run) -> None:
    """Check that two runs have bitwise the same parameters, updates, records, test score and predictions."""
    assert trained_bits(run) == trained_bits(other)
    for module, update in other.updates().items():
        assert np.array_equal(run.updates()[module].dense(), update.dense()), module
    assert run.meta.test == other.meta.test
    pd.testing.assert_frame_equal(run.predictions, other.predictions)
    tables = [each.table[~each.table["quantity"].isin(WALL_CLOCK)].drop(columns="run") for each in (run, other)]
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tables), check_exact=True)
    assert run.update_steps() == other.update_steps()


@pytest.mark.parametrize("name", METHODS)
def test_empty_fork_of_every_method_is_its_run_bit_by_bit(name, bert, task, tmp_path, fork):
    last = ls.train(models.load(bert, task=task), task, METHODS[name].example(), out=tmp_path / "trunk", **KEEP)
    for run in (last, *last.parents):
        for step in (2, 3):
            forked = fork(run, step)
            require_equal(forked, run)
            assert forked.id != run.id
            assert forked.meta.states == run.meta.states


def test_fork_at_step_zero_is_a_fresh_training_with_the_change(bert, task, trunk, fork, tmp_path):
    fresh = ls.train(models.load(bert, task=task), task, LORA, out=tmp_path / "lr", **SETTINGS | {"lr": 3e-3})
    require_equal(fork(trunk, 0, lr=3e-3), fresh)
    clipped = ls.train(
        models.load(bert, task=task),
        task,
        LORA,
        out=tmp_path / "clip",
        **SETTINGS | {"clip": 0.1, "schedule": "cosine"},
    )
    require_equal(fork(trunk, 0, clip=0.1, schedule="cosine"), clipped)
    dropped = dataclasses.replace(LORA, dropout=0.0)
    without = ls.train(models.load(bert, task=task), task, dropped, out=tmp_path / "dropout", **SETTINGS)
    require_equal(fork(trunk, 0, dropout=0.0), without)
    wide = dataclasses.replace(LORA, rank=6, alpha=16.0)
    resized = ls.train(models.load(bert, task=task), task, wide, out=tmp_path / "rank", **SETTINGS)
    require_equal(fork(trunk, 0, rank=6), resized)


def test_equal_forks_are_equal_and_one_that_changes_nothing_by_value_is_the_run(trunk, fork):
    first, second = (fork(trunk, 2, lr=3e-3, clip=0.5) for _ in range(2))
    require_equal(first, second)
    assert first.id == second.id
    assert first.score.loss != trunk.score.loss
    same = fork(trunk, 2, lr=1e-2, schedule="linear", clip=1.0, dropout=0.2)
    require_equal(same, trunk)


@pytest.mark.parametrize("step", [2, 3])
def test_rates_after_a_fork_follow_the_changed_schedule(step, trunk, fork):
    forked = fork(trunk, step, lr=4e-3, schedule="constant")
    rates = forked.table.query("quantity == 'lr'").set_index("step")["value"]
    before = trunk.table.query("quantity == 'lr'").set_index("step")["value"]
    assert (rates.loc[:step] == before.loc[:step]).all()
    assert (rates.loc[step + 1 :] == 4e-3).all()
    head = dataclasses.asdict(LORA)["head_lr"]
    assert fork(trunk, step, head_lr=head).score == trunk.score
    assert fork(trunk, step, head_lr=2 * head).score != trunk.score


def test_interrupted_fork_resumes_bit_by_bit(trunk, fork, tmp_path, monkeypatch):
    whole = fork(trunk, 2, lr=3e-3)
    out = tmp_path / "interrupted"

    def stop(session, *given, record=Session.record):
        record(session, *given)
        if session.step.finished == 4:
            session.checkpoint()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            fork(trunk, 2, lr=3e-3, out=out)
    resumed = fork(trunk, 2, lr=3e-3, out=out)
    require_equal(resumed, whole)
    # The same call returns the finished run, and restores it into the model.
    assert fork(trunk, 2, lr=3e-3, out=out).id == resumed.id
    assert not list(out.glob("resume/*"))


def test_kept_checkpoints_change_nothing_and_are_part_of_the_run(bert, task, trunk, tmp_path):
    plain = ls.train(models.load(bert, task=task), task, LORA, out=tmp_path / "plain", **SETTINGS)
    assert plain.id == trunk.id
    require_equal(plain, trunk)
    assert {file.name for file in trunk.path.glob("checkpoints/step-*")} == {
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    }
    copy = tmp_path / "copy"
    shutil.copytree(trunk.path, copy)
    again = ls.train(models.load(bert, task=task), task, LORA, out=copy, overwrite=True, **SETTINGS)
    assert not (again.path / "checkpoints").exists()


def test_trunk_is_found_next_to_the_fork(trunk, fork, tmp_path):
    forked = fork(trunk, 2, lr=3e-3, out=None)
    assert forked.path.parent == trunk.path.parent
    assert forked.trunk.id == ls.load(forked.path).trunk.id == trunk.id
    assert trunk.trunk is None
    assert (forked.meta.fork.run, forked.meta.fork.step, forked.meta.fork.change) == (trunk.id, 2, {"lr": 3e-3})
    assert forked.label == f"{trunk.label}, from step 2: lr 0.003"
    assert forked.meta.settings["lr"] == 3e-3
    moved = tmp_path / "alone" / "fork"
    shutil.copytree(forked.path, moved)
    with pytest.raises(FileNotFoundError, match=f"trunk .*{trunk.id}.*next to it"):
        ls.load(moved).trunk  # noqa: B018


def test_trunk_of_a_phase_is_found(bert, task, tmp_path, fork):
    method = METHODS["autolora"].example()
    run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "phases", **KEEP)
    forked = fork(run, 2, dropout=0.0)
    assert ls.load(forked.path).trunk.path == run.path
    assert forked.meta.recipe == run.meta.recipe


def test_other_rows_change_the_batches_after_the_fork_only(trunk, fork, task, bert, tmp_path):
    table = task.table.drop(columns="split").assign(text="fine " + task.table["text"])
    rows = tasks.from_frame(table, "prefixed")
    forked = fork(trunk, 2, rows=rows)
    losses = [run.table.query("quantity == 'loss'")["value"].to_numpy() for run in (trunk, forked)]
    assert np.array_equal(losses[0][:2], losses[1][:2])
    assert (losses[0][2:] != losses[1][2:]).all()
    assert forked.meta.task == trunk.meta.task
    assert forked.meta.fork.change["rows"].startswith("prefixed ")
    assert fork(trunk, 2, rows=task).score == trunk.score
    fresh = ls.train(models.load(bert, task=task), rows, LORA, out=tmp_path / "rows", **SETTINGS)
    assert trained_bits(fork(trunk, 0, rows=rows)) == trained_bits(fresh)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_more_rank_keeps_the_update_and_trains_the_new_components(method, rslora, bert, task, fork, tmp_path):
    small = METHODS[method](rank=2, rslora=rslora, lr=1e-2)
    observe = [ls.observe.factors(every=1)]
    run = ls.train(models.load(bert, task=task), task, small, out=tmp_path / "run", observe=observe, **KEEP)
    started: dict[str, torch.Tensor] = {}

    class Stop(Exception):
        pass

    def look(session, index):
        started.update({name: p.detach().clone() for name, p in session.model.named_parameters() if ".delta." in name})
        scales.update({name: delta.scale for name, delta in session.method._deltas.items()})
        raise Stop

    scales: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorascope.training.loop.advance", look)
        with pytest.raises(Stop):
            fork(run, 3, rank=5)
    for module, update in run.updates(3).items():
        A, B = started[f"{module}.delta.A"], started[f"{module}.delta.B"]
        stored = run.factors(3)[module]
        assert np.array_equal(A[:2].numpy(), stored["A"])
        assert np.array_equal(B[:, :2].numpy(), stored["B"])
        assert not B[:, 2:].any()
        assert A[2:].abs().min() > 0
        if method == "lora":
            assert (scales[module] * B @ A).numpy() == pytest.approx(update.dense(), rel=1e-6, abs=1e-8)
    forked = fork(run, 3, rank=5)
    assert set(forked.ranks().values()) == {5}
    assert all(np.abs(factors["B"][:, 2:]).max() > 0 for factors in forked.factors().values())
    restored = models.load(bert, task=task)
    forked.restore(restored)


def test_less_rank_is_the_truncated_svd(trunk, fork, bert, task, tmp_path):
    run = ls.train(
        models.load(bert, task=task), task, LORA, out=tmp_path / "run", observe=[ls.observe.factors(every=1)], **KEEP
    )
    # A rate of almost zero leaves the cut update as it is.
    forked = fork(run, 3, rank=1, lr=1e-30, head_lr=1e-30)
    for module, update in forked.updates().items():
        U, sigma, Vt = np.linalg.svd(run.updates(3)[module].dense())
        best = sigma[0] * np.outer(U[:, 0], Vt[0])
        assert update.dense() == pytest.approx(best, rel=1e-5, abs=1e-7)


def test_a_run_that_diverged_can_be_forked(bert, task, tmp_path, fork, monkeypatch):
    def diverge(session, *, backward=Session.backward):
        return math.nan if session.step.index == 3 else backward(session)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "backward", diverge)
        with pytest.raises(FloatingPointError):
            ls.train(models.load(bert, task=task), task, LORA, out=tmp_path / "broken", **KEEP)
    broken = ls.load(tmp_path / "broken")
    assert fork(broken, 3, lr=1e-3).finished


def test_bad_input_is_one_line(trunk, fork, task, bert, tmp_path):
    def fails(match, *given, error=ValueError, **options):
        with pytest.raises(error, match=match) as caught:
            fork(*given, **options)
        assert "\n" not in str(caught.value)

    fails(r"step must be 0 or one of 2, 3 \(stored checkpoints\), got 4", trunk, 4)
    fails(r"step must be 0 or one of 2, 3", trunk, True)
    fails("unknown change 'learning_rate'; expected one of lr, head_lr, .*, rows, rank", trunk, 2, learning_rate=1.0)
    fails("lr must be", trunk, 2, lr=-1.0)
    fails("schedule must be one of", trunk, 2, schedule="cos")
    fails("dropout must be", trunk, 2, dropout=2.0)
    fails("cannot fork with targets=.*does not fit", trunk, 2, targets=("q",))
    fails("rank must be an integer >= 1, got 0", trunk, 2, rank=0)
    fails("rank must be an integer >= 1, got {", trunk, 2, rank={"a": 1})
    fails("rows must have the labels", trunk, 2, rows=tasks.from_frame(relabeled(task), "other"))
    with pytest.raises(ValueError, match="task must be the data of"):
        ls.fork(trunk, models.load(bert, task=task), tasks.from_frame(relabeled(task), "x"), step=2, out=tmp_path / "x")
    other = models.load(bert, task=task)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"model must be .* with different weights"):
        ls.fork(trunk, other, task, step=2, out=tmp_path / "x")
    with pytest.raises(ValueError, match="pass task="):
        ls.fork(trunk, models.load(bert, task=task), step=2, out=tmp_path / "x")
    forked = fork(trunk, 2)
    fails("is a fork itself", forked, 0)
    with pytest.raises(ValueError, match=r"cannot fork adapter .*: no optimizer state"):
        ls.fork(ls.example("adapter"), step=2)
    plain = ls.train(models.load(bert, task=task), task, LORA, out=tmp_path / "plain", **SETTINGS)
    fails(r"has no stored checkpoints.*keep_checkpoints=\(2,\)", plain, 2)
    fails("cannot fork with init_rank", adalora(bert, task, tmp_path), 2, init_rank=4)
    fails("cannot fork with rank=3.*does not fit", pissa(bert, task, tmp_path), 2, rank=3)
    assert not (tmp_path / "x").exists()


def relabeled(task) -> pd.DataFrame:
    return task.table.drop(columns="split").assign(label=task.table["label"].str.upper())


def adalora(bert, task, tmp_path) -> ls.Run:
    method = METHODS["adalora"].example()
    return ls.train(models.load(bert, task=task), task, method, out=tmp_path / "adalora", **KEEP)


def pissa(bert, task, tmp_path) -> ls.Run:
    method = METHODS["pissa"](rank=2)
    return ls.train(models.load(bert, task=task), task, method, out=tmp_path / "pissa", **KEEP)


@pytest.mark.parametrize(
    "steps", [(0,), (5,), pytest.param((1.5,), marks=unchecked), (True,), pytest.param(3, marks=unchecked)]
)
def test_checkpoints_to_keep_are_steps_before_the_last(steps, bert, task, tmp_path):
    with pytest.raises(ValueError, match="keep_checkpoints must be steps from 1 to 4, got"):
        ls.train(
            models.load(bert, task=task), task, LORA, out=tmp_path / "run", **SETTINGS | {"keep_checkpoints": steps}
        )


def test_change_of_the_optimizer_class_is_rejected(bert, task, tmp_path, fork):
    run = ls.train(models.load(bert, task=task), task, METHODS["full"](), out=tmp_path / "full", **KEEP)
    with pytest.raises(ValueError, match=r"cannot fork with optimizer_name='adafactor': .*optimizer"):
        fork(run, 2, optimizer_name="adafactor")


def test_change_of_an_optimizer_option_takes_effect(bert, task, tmp_path, fork):
    method = METHODS["adapprox"].example()
    run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "adapprox", **KEEP)
    fields = {field.name for field in dataclasses.fields(method)}
    assert "clip_threshold" in fields
    assert fork(run, 2, clip_threshold=method.clip_threshold).score == run.score
    assert fork(run, 2, clip_threshold=0.01).score != run.score


@unchecked
def test_command_rejects_a_value_of_another_type(bert, task, tmp_path, capsys):
    table = tmp_path / "reviews.csv"
    task.table[["text", "label"]].to_csv(table, index=False)
    run = ls.train(bert, str(table), LORA, out=tmp_path / "run", **KEEP)
    assert main(["fork", str(run.path), "--step", "2", "--no-progress", "--set", "lr=high"]) == 2
    assert "lr must be a number, got 'high'" in capsys.readouterr().err


def test_name_and_task_of_the_run_are_used_by_default(bert, task, tmp_path):
    table = Path(tmp_path / "reviews.csv")
    task.table[["text", "label"]].to_csv(table, index=False)
    run = ls.train(bert, str(table), LORA, out=tmp_path / "run", **KEEP)
    forked = ls.fork(run, step=2, out=tmp_path / "fork", device="cpu", progress=False)
    require_equal(forked, run)


def test_command_forks_a_run_and_prints_its_effect(bert, task, tmp_path, capsys):
    table = tmp_path / "reviews.csv"
    task.table[["text", "label"]].to_csv(table, index=False)
    run = ls.train(bert, str(table), LORA, out=tmp_path / "run", **KEEP)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["fork", *words])
        return code, *capsys.readouterr()

    options = ["--step", "2", "--device", "cpu", "--no-progress"]
    capsys.readouterr()
    code, out, _ = call(str(run.path), *options, "--set", "lr=3e-3", "clip=none", "-o", str(tmp_path / "fork"))
    assert code == 0
    assert "lr 0.003, clip None, from step 2 on (40% of the training)" in out
    forked = ls.load(tmp_path / "fork")
    assert forked.meta.fork.change == {"lr": 3e-3, "clip": None}
    code, out, _ = call(str(run.path), *options, "--json")
    assert json.loads(out)["table"][0]["effect"] == 0
    for words, message in (
        ([], "RUN is required"),
        ([str(run.path)], "--step is required"),
        ([str(run.path), *options, "--set", "lr"], "--set must be NAME=VALUE, got 'lr'"),
        ([str(run.path), *options, "--set", "lr=1", "lr=2"], "--set must have each name once, got lr twice"),
        ([str(run.path), *options, "--set", "out=x"], "--set cannot change out"),
        ([str(run.path), "--step", "4"], "step must be 0 or one of 2, 3 (stored checkpoints), got 4"),
    ):
        code, _, error = call(*words)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
