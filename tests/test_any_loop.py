"""Tests of the recorder of any loop: the same rows as under a Trainer, and no effect on the training."""

from __future__ import annotations

import copy
import errno
import gc
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.numpy import load_file
from torch import nn
from trainers import ROWS, STEPS, by_trainer, fresh, same_rows, same_weights, training_rows, with_peft
from transformers import get_scheduler

import lorascope as ls
from lorascope.adapters import delta, host_weights
from lorascope.cli.main import main
from lorascope.training import run_folder
from lorascope.training.any_loop import UNSTEPPED

NORMS = [ls.observe.norms(every=2), ls.observe.factors(every=3), ls.observe.gradients(every=2)]
TIMES = ["seconds", "factor_seconds"]
unchecked = pytest.mark.skipif(hasattr(ls.record, "__wrapped__"), reason="types are checked at every call")


@pytest.fixture(scope="module")
def rows(bert, task):
    return training_rows(bert, task)


def full(bert, task):
    model = fresh(bert, task)
    model.accepts_loss_kwargs = False  # so that the Trainer divides the loss by the number of micro-batches
    return model


def with_lora(bert, task):
    model = with_peft(full(bert, task))
    model.accepts_loss_kwargs = False
    return model


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def batches(rows, size):
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


def train(model, optimizer, rows, record=lambda **values: None, accumulate=1, clip=0.1):
    """Train as the Trainer does: AdamW, clipping and a linear schedule, over the rows in order."""
    model.train()
    scheduler = get_scheduler("linear", optimizer, 0, STEPS)
    pieces = batches(rows, ROWS // accumulate)
    for start in range(0, len(pieces), accumulate):
        total = torch.zeros(())
        for piece in pieces[start : start + accumulate]:
            piece = {("labels" if key == "label" else key): value for key, value in piece.items()}
            loss = model(**piece).loss / accumulate
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        scheduler.step()
        record(loss=total, grad_norm=norm)
        optimizer.zero_grad()


class Loop:
    """Small model that is trained in a loop and recorded in a folder."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.folder = folder

    def record(self, observe=None, **settings):
        return ls.record(self.model, self.optimizer, self.folder, observe, **settings)

    def step(self):
        data = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        self.optimizer.zero_grad()
        loss = self.model(data).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss

    def step_and_record(self, recorder):
        loss = self.step()
        recorder.step(loss=loss)
        return loss.item()

    def read(self):
        return ls.load(self.folder)


@pytest.fixture
def loop(tmp_path):
    return Loop(tmp_path / "run")


def last(run, quantity, module):
    table = run.table[(run.table["quantity"] == quantity) & (run.table["module"] == module)]
    return table.loc[table["step"].idxmax(), "value"]


@pytest.mark.parametrize("steps", [STEPS, None])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [full, with_lora])
def test_rows_arrays_and_states_equal_those_under_a_trainer(make, accumulate, steps, bert, task, rows, tmp_path):
    one, other = make(bert, task), make(bert, task)
    settings = {"max_grad_norm": 0.1, "accumulate": accumulate, "optimizer": adamw(one)}
    by_trainer(one, rows, tmp_path / "trainer", recorder=ls.TrainerRecorder(observe=NORMS), **settings)
    optimizer = adamw(other)
    with ls.record(other, optimizer, tmp_path / "loop", NORMS, steps=steps) as recorder:
        train(other, optimizer, rows, recorder.step, accumulate)
    same_weights(one, other)
    expected, found = ls.load(tmp_path / "trainer/lorascope"), ls.load(tmp_path / "loop")
    same_rows(found.table, expected.table, but=TIMES)
    assert {"loss", "grad_norm", "gradient_norm", "lr", "update_norm", "step_norm"} <= set(found.table["quantity"])
    assert found.meta.status == "done"
    assert found.meta.checksums.keys() == expected.meta.checksums.keys()
    for name in expected.meta.checksums:
        if name.endswith(".safetensors"):
            arrays = load_file(expected.path / name)
            assert arrays.keys() == load_file(found.path / name).keys()
            for key, array in load_file(found.path / name).items():
                np.testing.assert_array_equal(array, arrays[key])
    same = ["states", "modules", "hosts", "parameters", "labels", "task_type", "left_out", "quantities", "facts"]
    for key in same:
        assert getattr(found.meta, key) == getattr(expected.meta, key), key
    assert found.meta.settings == {key: expected.meta.settings[key] for key in found.meta.settings}


@pytest.mark.parametrize("make", [full, with_lora])
def test_weights_and_generators_are_bitwise_equal_with_and_without_the_recorder(make, bert, task, rows, tmp_path):
    trained, states = [], []
    for recorded in (True, False):
        torch.manual_seed(0)
        model = make(bert, task)
        optimizer = adamw(model)
        if recorded:
            with ls.record(model, optimizer, tmp_path / "run", NORMS) as recorder:
                train(model, optimizer, rows, recorder.step)
        else:
            train(model, optimizer, rows)
        trained.append(model)
        states.append(torch.get_rng_state())
    same_weights(*trained)
    assert torch.equal(*states)


def test_run_of_a_plain_model_is_readable(loop):
    before = loop.model[0].weight.detach().clone()
    recorder = loop.record(seed=3, task="noise")
    losses = [loop.step_and_record(recorder) for _ in range(3)]
    recorder.evaluate(loss=0.5, metric=torch.tensor(0.75))
    run = recorder.close()
    assert recorder.close() is None
    assert (run.seed, run.task, run.label, run.meta.settings["steps"]) == (3, "noise", "PyTorch loop, SGD", 3)
    read = loop.read()
    table = read.table.set_index("quantity")["value"]
    assert table["loss"].tolist() == losses
    assert (table["eval_loss"], table["eval_metric"]) == (0.5, 0.75)
    change = float((loop.model[0].weight.detach() - before).norm())
    assert last(read, "update_norm", "0") == pytest.approx(change, rel=1e-6)
    assert "steps   3\n" in repr(read)


def test_unknown_seed_and_task_are_omitted_from_descriptions(loop, capsys):
    run = loop.record().close()
    main(["inspect", str(loop.folder)])
    shown = repr(run) + capsys.readouterr().out
    assert shown.count("PyTorch loop, SGD") == shown.count("Sequential") == 2
    assert "None" not in shown


def test_call_without_an_optimizer_step_records_nothing(loop):
    with loop.record() as recorder:
        recorder.step(loss=1.0)
        loop.step_and_record(recorder)
        recorder.step(loss=2.0)
    assert loop.read().table["step"].max() == 1


@pytest.mark.parametrize("fused", [True, False])
def test_step_that_grad_scaler_skips_is_not_recorded(fused, loop):
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with loop.record([ls.observe.norms(every=1)]) as recorder:
        for factor in (1.0, torch.inf, 2.0):
            loop.optimizer.zero_grad()
            loss = loop.model(torch.ones(2, 4)).square().mean() * factor
            scaler.scale(loss).backward()
            before = loop.model[0].weight.detach().clone()
            scaler.step(loop.optimizer)
            scaler.update()
            assert torch.equal(before, loop.model[0].weight) == (factor == torch.inf)
            recorder.step(loss=loss)
    table = loop.read().table
    losses = table[table["quantity"] == "loss"]
    assert losses["step"].tolist() == [1, 2]
    assert np.isfinite(losses["value"]).all()
    assert (table[table["quantity"] == "step_norm"]["value"] > 0).all()


def test_learning_rate_equals_that_of_the_step_regardless_of_the_scheduler(loop):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.5)
    with loop.record() as recorder:
        for _ in range(3):
            loss = loop.step()
            scheduler.step()
            recorder.step(loss=loss)
    table = loop.read().table
    assert table[table["quantity"] == "lr"]["value"].tolist() == [0.1, 0.05, 0.025]


def test_steps_beyond_the_planned_ones_are_recorded(loop):
    with loop.record(steps=2) as recorder:
        for _ in range(3):
            loop.step_and_record(recorder)
    run = loop.read()
    assert (run.meta.states["last"].step, run.meta.settings["steps"]) == (3, 3)
    assert run.table.query("quantity == 'update_norm' and module == '0'")["step"].tolist() == [0, 2, 3]


def test_training_under_accelerate_is_recorded(bert, task, rows, tmp_path):
    """Accelerate skips the optimizer steps between micro-batches, so the recorder may be called after each of them."""
    plain, model = with_lora(bert, task), with_lora(bert, task)
    train(plain, adamw(plain), rows, accumulate=2, clip=torch.inf)
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = adamw(model)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, get_scheduler("linear", optimizer, 0, STEPS))
    model.train()
    with ls.record(model, optimizer, tmp_path / "run", NORMS) as recorder:
        for batch in batches(rows, ROWS // 2):
            with accelerator.accumulate(model):
                loss = model(**{("labels" if key == "label" else key): value for key, value in batch.items()}).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                recorder.step(loss=loss)
                optimizer.zero_grad()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    same_weights(plain, accelerator.unwrap_model(model))
    run = ls.load(tmp_path / "run")
    assert run.finished
    assert run.table.query("quantity == 'loss'")["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.ranks() == dict.fromkeys(dict(delta.deltas(plain)), 3)


def test_active_adapter_of_several_is_recorded_under_its_name(bert, task, rows, tmp_path):
    model = with_lora(bert, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["key"], r=2))
    model.set_adapter("second")
    optimizer = adamw(model)
    with ls.record(model, optimizer, tmp_path / "run") as recorder:
        train(model, optimizer, rows, recorder.step)
    run = ls.load(tmp_path / "run")
    found = dict(delta.deltas(model))
    assert run.ranks() == dict.fromkeys(found, 2)
    assert {name.rpartition(".")[2] for name in found} == {"key"}
    assert run.label == "PEFT LORA, r 2, adapter second"
    assert run.meta.method["adapters"] == ["second"]
    for name, update in found.items():
        assert update.norm() > 0
        assert last(run, "update_norm", name) == pytest.approx(update.norm(), rel=1e-12)


def test_frozen_base_weights_in_the_optimizer_are_neither_copied_nor_recorded(bert, task, rows, tmp_path):
    model = with_lora(bert, task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with ls.record(model, optimizer, tmp_path / "run") as recorder:
        kept = set(recorder._recording.base.kept)
        train(model, optimizer, rows, recorder.step)
    assert kept == {"classifier.weight", "classifier.bias"}
    run = ls.load(tmp_path / "run")
    assert set(run.summary()["module"]) == {*dict(delta.deltas(model)), "classifier"}


def test_parameters_that_are_unfrozen_later_are_recorded(loop):
    loop.model[0].requires_grad_(False)
    with loop.record() as recorder:
        loop.step_and_record(recorder)
        loop.model[0].requires_grad_(True)
        loop.step_and_record(recorder)
    assert last(loop.read(), "update_norm", "0") > 0


def test_wrapped_models_are_recorded_under_their_own_names(tmp_path):
    for number, wrap in enumerate([nn.DataParallel, lambda model: torch.compile(model, backend="eager")]):
        loop = Loop(tmp_path / str(number))
        with ls.record(wrap(loop.model), loop.optimizer, loop.folder) as recorder:
            loop.step_and_record(recorder)
        assert set(loop.read().summary()["module"]) == {"0", "2"}


def test_only_the_first_process_of_ddp_writes(loop, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with loop.record() as recorder:
        loop.step_and_record(recorder)
        recorder.evaluate(loss=1.0)
    assert not loop.folder.exists()


def test_exception_marks_the_run_as_broken_and_keeps_its_rows(loop):

    def fail():
        with loop.record() as recorder:
            for _ in range(3):
                loop.step_and_record(recorder)
            raise RuntimeError("out of memory\nat step 4")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    run = loop.read()
    assert (run.meta.status, run.meta.error) == ("broken", "RuntimeError: out of memory")
    assert run.table.query("quantity == 'loss'")["step"].tolist() == [1, 2, 3]
    assert not run.meta.states


def test_run_that_is_not_closed_stays_running_with_all_rows(loop):
    recorder = loop.record()
    loop.step_and_record(recorder)
    assert loop.read().meta.status == "running"
    del recorder
    gc.collect()
    run = loop.read()
    assert (run.meta.status, run.meta.error, run.table["step"].max()) == ("running", None, 1)


def test_another_run_in_the_folder_is_moved_aside(loop, tmp_path):
    first = loop.record().close()
    open_recorder = loop.record()
    loop.step_and_record(open_recorder)
    last = loop.record().close()
    assert loop.read().id == last.id
    assert ls.load(tmp_path / f"run-{first.id}").finished
    assert sum(ls.load(path).table["step"].max() for path in tmp_path.iterdir()) == 1


KILLED = """
import os, signal, sys, torch
import lorascope as ls
from lorascope.training import run_folder
from lorascope.training.any_loop import UNSTEPPED

run_folder.FLUSH_SECONDS = 0.0
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with ls.record(model, optimizer, sys.argv[1]) as recorder:
    for step in range(5):
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
        recorder.step(loss=loss)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_process_leaves_a_readable_run(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], check=False)
    assert done.returncode == -signal.SIGKILL
    run = ls.load(tmp_path / "run")
    assert run.meta.status == "running"
    assert run.table.query("quantity == 'loss'")["step"].tolist() == [1, 2, 3, 4, 5]
    assert run.meta.settings["steps"] == 5


def test_run_can_be_read_during_training(loop, monkeypatch):
    monkeypatch.setattr(run_folder, "FLUSH_SECONDS", 0.0)
    with loop.record() as recorder:
        for step in (1, 2):
            loop.step_and_record(recorder)
            run = loop.read()
            assert (run.meta.status, run.table["step"].max()) == ("running", step)


@pytest.mark.parametrize(("took", "flushes"), [(0.1, 33), (0.3, 33), (3.0, 3)])
def test_writing_takes_at_most_one_percent_of_a_long_training(took, flushes, loop, monkeypatch):
    now = 0.0
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)
    recorder = loop.record()
    written = []

    def flush():
        nonlocal now
        now += took
        written.append(now)

    monkeypatch.setattr(recorder._recording.writer, "flush", flush)
    for _ in range(1000):
        now += 1.0
        loop.step_and_record(recorder)
    assert len(written) == pytest.approx(flushes, abs=1)


def test_full_disk_does_not_stop_training(loop, monkeypatch):

    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recorder = loop.record([ls.observe.factors()])
    loop.step_and_record(recorder)
    monkeypatch.setattr(os, "fsync", fail)
    loop.step_and_record(recorder)
    with pytest.warns(UserWarning, match="No space left"):
        assert recorder.close() is None
    monkeypatch.undo()
    assert loop.read().meta.status == "running"


@unchecked
def test_invalid_arguments_are_rejected_in_one_line(loop, tmp_path):
    other = copy.deepcopy(loop.model)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").touch()
    cases = [
        (lambda: ls.record(other, loop.optimizer, loop.folder), "trains no parameter of the model"),
        (lambda: ls.record(loop.model, "adam", loop.folder), r"optimizer must be a torch\.optim\.Optimizer, got str"),
        (lambda: loop.record(steps=0), "steps must be an integer >= 1 or None, got 0"),
        (lambda: ls.record(loop.model, loop.optimizer, tmp_path / "foreign"), "contains files but no run"),
        (lambda: loop.record([ls.observe.utilization()]), "held-out text in your"),
        (lambda: loop.record([ls.observe.norms]), "observe must be a list of observ"),
        (lambda: loop.record(ls.observe.norms()), "observe must be a list of observ"),
        (lambda: loop.record(seed="x"), "seed must be an integer or None, got 'x'"),
        (lambda: loop.record(seed=1.0), "seed must be an integer or None, got 1.0"),
        (lambda: loop.record(task=3), "task must be a string or None, got 3"),
        (lambda: loop.record(steps=2.5), "steps must be an integer >= 1 or None"),
        (lambda: loop.record(report_to=3), "report_to must be .* got 3"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_rejected_recorder_leaves_no_hook_on_the_optimizer(loop, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="contains files but no run"):
        ls.record(loop.model, loop.optimizer, tmp_path)
    assert not loop.optimizer._optimizer_step_post_hooks


def test_optimizer_that_was_replaced_is_named_at_its_first_step(loop):
    with loop.record() as recorder:
        loop.step_and_record(recorder)
        loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
        with pytest.warns(UserWarning, match="has not stepped in the last call of recorder.step"):
            loop.step_and_record(recorder)
        loop.step_and_record(recorder)  # warned once
    assert loop.read().table["step"].max() == 1


def test_optimizer_that_never_steps_is_named_at_the_end_or_after_many_calls(loop):
    recorder = loop.record()
    recorder.step(loss=1.0)
    with pytest.warns(UserWarning, match="has not stepped in the last call"):
        recorder.close()
    recorder = loop.record()
    for _ in range(UNSTEPPED - 1):
        recorder.step(loss=1.0)
    with pytest.warns(UserWarning, match=f"has not stepped in the last {UNSTEPPED} calls"):
        recorder.step(loss=1.0)
    recorder.close()  # warned once


def test_accumulation_before_the_first_step_is_no_unused_optimizer(loop):
    with loop.record() as recorder:
        for _ in range(3):
            recorder.step(loss=1.0)
        loop.step_and_record(recorder)


@pytest.mark.parametrize("end", [False, True])
def test_steps_between_two_calls_are_counted_and_named(end, loop):
    recorder = loop.record()
    loop.step_and_record(recorder)
    for _ in range(2):
        loop.step()
    with pytest.warns(UserWarning, match="the optimizer has stepped 2 times since the last call"):
        recorder.close() if end else recorder.step()
    recorder.close()
    assert loop.read().table["step"].max() == (1 if end else 2)


def test_closed_recorder_says_so_once(loop):
    recorder = loop.record()
    recorder.close()
    with pytest.warns(UserWarning, match="the recorder is closed"):
        loop.step_and_record(recorder)
    recorder.evaluate(loss=1.0)
    with pytest.raises(ValueError, match="the recorder is closed"), recorder:
        pass
    assert loop.read().table["step"].max() == 0


def test_recorder_whose_folder_another_one_has_taken_writes_no_more(loop, tmp_path):
    first = loop.record()
    loop.step_and_record(first)
    second = loop.record()
    loss = loop.step()
    with pytest.warns(UserWarning, match="another recorder writes to .*run: pass it another out"):
        first.step(loss=loss)
    second.step(loss=loss)
    loss = loop.step()
    first.step(loss=loss)
    second.step(loss=loss)
    first.evaluate(loss=1.0)
    assert first.close() is None
    second.evaluate(loss=2.0)
    run = second.close()
    found = loop.read()
    assert (found.id, found.meta.status, found.table["step"].max()) == (run.id, "done", 2)
    assert found.table.query("quantity == 'eval_loss'")["value"].tolist() == [2.0]
    (aside,) = (path for path in tmp_path.iterdir() if path.name != "run")
    assert ls.load(aside).table["step"].max() == 1


@unchecked
def test_seed_may_be_an_integer_of_numpy(loop):
    assert loop.record(seed=np.int64(3)).close().seed == 3


@unchecked
@pytest.mark.parametrize("value", ["x", {"loss": 1.0}, [1.0, 2.0], 1j, torch.ones(2)])
def test_values_that_are_no_number_are_rejected_when_they_are_passed(value, loop):
    with loop.record() as recorder:
        loop.step_and_record(recorder)
        loop.step()
        for name, call in {
            "loss": lambda: recorder.step(loss=value),
            "grad_norm": lambda: recorder.step(grad_norm=value),
            "metric": lambda: recorder.evaluate(metric=value),
        }.items():
            with pytest.raises(ValueError, match=f"{name} must be a number") as caught:
                call()
            assert "\n" not in str(caught.value)
        recorder.step(loss=np.float32(2.0), grad_norm=3)
    losses = loop.read().table.query("quantity == 'loss'")
    assert losses["step"].tolist() == [1, 2]
    assert losses["value"].iloc[-1] == 2.0


def test_loss_of_a_step_is_the_mean_over_the_micro_batches_of_accelerate(loop):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(loop.model, loop.optimizer)
    found = []
    with ls.record(model, optimizer, loop.folder) as recorder:
        for factor in (1.0, 3.0, 5.0, 7.0):
            with accelerator.accumulate(model):
                loss = model(torch.ones(2, 4)).square().mean() * factor
                found.append(loss.item())
                accelerator.backward(loss)
                optimizer.step()
                recorder.step(loss=loss)
                optimizer.zero_grad()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    losses = loop.read().table.query("quantity == 'loss'")["value"]
    assert losses.tolist() == [(found[0] + found[1]) / 2, (found[2] + found[3]) / 2]


def test_losses_of_a_step_that_was_skipped_are_not_those_of_the_next(loop):
    state = SimpleNamespace(sync_gradients=False)
    prepared = SimpleNamespace(optimizer=loop.optimizer, gradient_state=state)
    with ls.record(loop.model, prepared, loop.folder) as recorder:
        for loss, state.sync_gradients, steps in [(1.0, False, 0), (9.0, True, 0), (3.0, False, 0), (5.0, True, 1)]:
            if steps:
                loop.step()
            recorder.step(loss=loss)
    assert loop.read().table.query("quantity == 'loss'")["value"].tolist() == [4.0]


def test_parameters_that_join_the_optimizer_later_are_named(loop):
    loop.optimizer = torch.optim.SGD(loop.model[0].parameters(), lr=0.1)
    with loop.record() as recorder:
        loop.step_and_record(recorder)
        loop.optimizer.add_param_group({"params": loop.model[2].parameters()})
        with pytest.warns(UserWarning, match="2 parameters have joined the optimizer since ls.record"):
            loop.step_and_record(recorder)
        loop.step_and_record(recorder)


def with_two_adapters(bert, task):
    model = with_lora(bert, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    return model


def test_adapter_stays_recorded_while_another_one_or_none_is_active(bert, task, rows, tmp_path):
    model = with_two_adapters(bert, task)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name], lr=1e-2)
    found = dict(delta.deltas(model))
    with ls.record(model, optimizer, tmp_path / "run", [ls.observe.norms(every=1)]) as recorder:

        def step_and_record(loss=None):
            optimizer.step()
            recorder.step(loss=loss)
            optimizer.zero_grad()

        train(model, optimizer, rows, recorder.step)
        trained = {name: update.norm() for name, update in delta.deltas(model)}
        with model.disable_adapter():
            step_and_record()
        model.set_adapter("second")
        train(model, optimizer, rows, recorder.step)
    run = ls.load(tmp_path / "run")
    assert run.ranks() == dict.fromkeys(found, 3)
    table = run.table.query("quantity == 'update_norm' and step == @STEPS").set_index("module")["value"]
    model.set_adapter("default")
    now = dict(delta.deltas(model))
    for name, norm in trained.items():
        assert table[name] == pytest.approx(norm, rel=1e-12)
        assert last(run, "update_norm", name) == pytest.approx(now[name].norm(), rel=1e-12)
        np.testing.assert_array_equal(run.updates()[name].dense(), now[name].dense())


def test_adapters_that_train_in_turn_have_a_recorder_each(bert, task, rows, tmp_path):
    model = with_two_adapters(bert, task)
    recorders = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        optimizer = torch.optim.SGD([p for key, p in model.named_parameters() if f".{name}." in key], lr=0.1)
        recorders[name] = optimizer, ls.record(model, optimizer, tmp_path / name, [ls.observe.norms(every=1)])
    for batch in batches(rows, ROWS):
        for name, (optimizer, recorder) in recorders.items():
            model.set_adapter(name)
            model(**{("labels" if key == "label" else key): value for key, value in batch.items()}).loss.backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
    for name, rank in {"default": 3, "second": 2}.items():
        run = recorders[name][1].close()
        model.set_adapter(name)
        for module, update in delta.deltas(model):
            assert run.ranks()[module] == rank
            assert last(run, "update_norm", module) == pytest.approx(update.norm(), rel=1e-12)


def test_observers_of_a_recorder_copy_each_trained_parameter_once_per_step(bert, task, rows, tmp_path, monkeypatch):
    model = with_lora(bert, task)
    optimizer = adamw(model)
    places = {p.data_ptr() for name, p in model.named_parameters() if "lora_" in name}
    copied, plain = Counter(), host_weights._transfer
    observers = [ls.observe.norms(every=1), ls.observe.alarms(every=1), ls.observe.factors(every=1)]
    with ls.record(model, optimizer, tmp_path / "run", observers) as recorder:
        monkeypatch.setattr(
            host_weights, "_transfer", lambda tensors: copied.update(t.data_ptr() for t in tensors) or plain(tensors)
        )
        train(model, optimizer, rows, recorder.step)
        assert {copied[place] for place in places} == {STEPS}


def test_two_observers_of_one_kind_record_each_value_once(loop):
    with loop.record([ls.observe.norms(every=3), ls.observe.norms(every=2)]) as recorder:
        for _ in range(6):
            loop.step_and_record(recorder)
    table = loop.read().table
    norms = table[(table["quantity"] == "update_norm") & (table["module"] == "0")]
    assert norms["step"].tolist() == [0, 2, 3, 4, 6]


def test_run_stays_in_its_folder_if_the_program_changes_its_directory(loop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    recorder = ls.record(loop.model, loop.optimizer, "run")
    monkeypatch.chdir(tmp_path / "other")
    loop.step_and_record(recorder)
    recorder.close()
    assert loop.read().finished
    assert list((tmp_path / "other").iterdir()) == []


def test_version_of_peft_is_not_part_of_the_recipe(bert, task, tmp_path):
    model = with_lora(bert, task)
    recorder = ls.record(model, adamw(model), tmp_path / "run")
    assert "peft_version" not in recorder.close().meta.recipe


def test_file_that_was_replaced_after_it_was_opened_is_not_read(loop, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "FLUSH_SECONDS", 0)
    recorder = loop.record([ls.observe.norms(every=1, spectra_every=1)])
    loop.step_and_record(recorder)
    live = loop.read()
    before = live.snapshot("0/singular_values", 1)["value"].tolist()
    recorder.close()
    (file,) = tmp_path.glob("run/snapshots/step-*1.safetensors")
    file.with_suffix(".new").write_bytes(file.read_bytes())
    file.with_suffix(".new").replace(file)  # as the recorder replaces it when it adds arrays
    with pytest.raises(ValueError, match="it was replaced or changed after it was opened; open it again"):
        live.snapshot("2/singular_values", 1)
    assert loop.read().snapshot("0/singular_values", 1)["value"].tolist() == before


@unchecked  # a check adds frames
def test_warnings_name_the_line_of_the_call(loop):
    recorder = loop.record()
    recorder.close()
    with pytest.warns(UserWarning, match="the recorder is closed") as caught:
        recorder.step(loss=1.0)
    assert caught[0].filename == __file__


def test_start_that_changes_the_base_is_not_exported(bert, task, rows, tmp_path):
    """PEFT subtracts the initial product of PiSSA from the base, so B A does not fit the original one."""
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=3, init_lora_weights="pissa")
    model = peft.get_peft_model(full(bert, task), config)
    optimizer = adamw(model)
    with ls.record(model, optimizer, tmp_path / "run") as recorder:
        train(model, optimizer, rows, recorder.step)
    with pytest.raises(ValueError, match=r"^cannot export run .*: pissa changes the base model while PEFT loads it"):
        ls.export.to_peft(ls.load(tmp_path / "run"), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_recording_of_full_fine_tuning_has_no_weights_to_restore(loop):
    loop.record().close()
    run = loop.read()
    assert not run.restorable
    reason = r"; a recording stores only the weights of adapters that are matrices$"
    with pytest.raises(FileNotFoundError, match=reason):
        run.tensors()


def test_rejected_observer_leaves_the_run_of_the_folder(loop, tmp_path):
    first = loop.record().close()
    for _ in range(2):
        with pytest.raises(ValueError, match="held-out text in your"):
            loop.record([ls.observe.utilization()])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert loop.read().id == first.id
    assert loop.read().finished
    loop.step_and_record(recorder := ls.record(loop.model, loop.optimizer, tmp_path / "next"))
    assert recorder.close().table["step"].max() == 1
