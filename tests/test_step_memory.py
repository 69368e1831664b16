"""Memory of a step, compared with tensors of known size."""

from __future__ import annotations

import gc
import json
import math
import re
import runpy
import shutil
from dataclasses import astuple
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny_tokenizer
from tiny import tiny
from torch import nn

import lorascope as ls
from lorascope import observe
from lorascope.analysis import memory_estimate
from lorascope.experiments import isolated_run
from lorascope.experiments import step_memory as measuring
from lorascope.experiments.isolated_run import IsolatedRun, LiveWeights
from lorascope.methods import Full, LoRA
from lorascope.methods.method import Step
from lorascope.training.settings import Settings

FAST = {"steps": 3, "batch_size": 8, "eval_every": 0, "eval_size": 16, "progress": False, "device": "cpu"}
FEW = Settings(steps=2, lr=1e-3, head_lr=1e-3, batch_size=4, eval_size=1, test_size=1)
BLOCK = 100 * 2**20


def look(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    step = Step(0, 1, model, optimizer, {}, pd.DataFrame(), lambda *_: None, lambda *_: None, lambda *_: None)
    return {record.quantity: record.value for record in observe.memory()(step)}


def test_known_tensor_is_counted_as_parameter_gradient_and_state():
    model = nn.utils.skip_init(nn.Linear, BLOCK // 4 // 1024, 1024, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    assert look(model, optimizer) == {"parameter_bytes": BLOCK, "gradient_bytes": 0, "optimizer_bytes": 0}
    model.weight.grad = torch.ones_like(model.weight)
    assert look(model, optimizer)["gradient_bytes"] == BLOCK
    optimizer.step()
    assert look(model, optimizer) == {
        "parameter_bytes": BLOCK,
        "gradient_bytes": BLOCK,
        "optimizer_bytes": pytest.approx(2 * BLOCK, rel=0.02),
    }


def test_shared_storage_counts_once_and_a_view_counts_its_whole_storage():
    whole = torch.zeros(1000)
    assert observe.storage_bytes([whole, whole[:10], whole.view(10, 100), torch.zeros(5)]) == 4000 + 20
    assert observe.storage_bytes([whole[:10]]) == 4000


def test_tied_weights_count_once():
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    twin = nn.Parameter(model.lm_head.weight.detach())  # another parameter on the same storage
    model.lm_head.weight = twin
    assert len(list(model.parameters())) > len(memory_estimate.shapes_of(tiny("gpt2")))
    found = look(model, torch.optim.AdamW(model.parameters()))
    assert found["parameter_bytes"] == memory_estimate.full(memory_estimate.shapes_of(tiny("gpt2"))).parameters


def test_nested_optimizer_state_is_counted():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {
        "factors": [(torch.zeros(3), torch.zeros(4))],
        "rank": 2,
        "own": {"M": torch.zeros(5)},
    }
    assert look(model, optimizer)["optimizer_bytes"] == 4 * 12


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", [Full(), LoRA(rank=3, targets="all-linear")], ids=lambda method: method.name)
def test_memory_of_a_run_equals_the_estimate(family, method, task, tmp_path, request):
    model = ls.models.load(request.getfixturevalue(family), task=task)
    shapes = memory_estimate.shapes_of(model)
    run = ls.train(model, task, method, observe=[observe.memory(every=1)], out=tmp_path / "run", **FAST)
    table = run.table.pivot_table(index="step", columns="quantity", values="value", observed=True)
    head = [name for name, p in model.named_parameters() if p.requires_grad and ".delta." not in name]
    held = (
        memory_estimate.full(shapes) if method.name == "full" else memory_estimate.lora(shapes, 3, "all-linear", head)
    )
    assert table.loc[0, ["gradient_bytes", "optimizer_bytes"]].tolist() == [0, 0]
    for step in (1, 2, 3):
        found = table.loc[step, ["parameter_bytes", "gradient_bytes", "optimizer_bytes"]].astype(int)
        assert memory_estimate.MemoryUse(*found.tolist()) == held


def test_peak_counts_a_known_tensor_in_the_window():
    """Tensors alive before the window count; tensors freed before it do not."""
    allocator = measuring._allocator("cpu")
    kept = torch.empty(BLOCK, dtype=torch.uint8)
    del_me = torch.empty(3 * BLOCK, dtype=torch.uint8)
    del del_me
    with allocator.window():
        first = torch.empty(BLOCK, dtype=torch.uint8)
        second = torch.empty(BLOCK // 2, dtype=torch.uint8)
        del first, second
        torch.empty(BLOCK, dtype=torch.uint8)
    torch.empty(4 * BLOCK, dtype=torch.uint8)
    assert allocator.peak() == pytest.approx(2.5 * BLOCK, rel=0.02)
    assert kept.nbytes == BLOCK


def test_peak_on_a_device_without_allocator_is_nan():
    allocator = measuring._allocator("mps")
    with allocator.window():
        torch.empty(8)
    assert math.isnan(allocator.peak())


class Card:
    """Fake allocator of one card: the peak rises with the allocated bytes until it is reset."""

    def __init__(self, monkeypatch, device: str, given: int) -> None:
        self.device, self.alive, self.mark = torch.device(device), given, given
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", self.read)

    def reset(self, device: torch.device) -> None:
        assert device == self.device
        self.mark = self.alive

    def read(self, device: torch.device) -> int:
        assert device == self.device
        return self.mark

    def give(self, change: int) -> None:
        self.alive += change
        self.mark = max(self.mark, self.alive)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_peak_covers_only_the_window(device, monkeypatch):
    card = Card(monkeypatch, device, 5)
    allocator = measuring._allocator(device)
    card.give(100)
    card.give(-98)
    with allocator.window():
        card.give(20)
        card.give(-10)
    assert allocator.peak() == 27


def test_cuda_peak_of_a_run_covers_only_the_last_step(bert, task, tmp_path, monkeypatch):
    """The run stays on the CPU; its steps allocate 70, then 30."""
    card = Card(monkeypatch, "cuda", 1000)
    taken, advance, allocator = iter((70, 30)), measuring.advance, measuring._allocator

    def taking(session, index):
        much = next(taken)
        card.give(much)
        card.give(-much)
        return advance(session, index)

    monkeypatch.setattr(measuring, "advance", taking)
    monkeypatch.setattr(measuring, "_allocator", lambda device: allocator("cuda"))
    measuring._measure_memory(IsolatedRun(bert, task, LoRA(), FEW, 0, tmp_path / "run", "", False, "cpu"))
    table = ls.Run.read(tmp_path / "run").table
    marks = table[table["quantity"] == "peak_bytes"]
    assert marks[["step", "value"]].to_numpy().tolist() == [[2, 1030]]


@pytest.fixture(scope="module")
def wide_bert(tmp_path_factory) -> str:
    """A tiny BERT whose embedding takes 100 MiB."""
    path = tmp_path_factory.mktemp("models") / "wide"
    tiny("bert", "base", vocab_size=BLOCK // 4 // 32).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def test_measure_reports_the_peak_of_a_step(wide_bert, task, tmp_path):
    """The known tensor is frozen, so it is allocated once; everything else is small."""
    run = ls.step_memory.measure(wide_bert, task, LoRA(), batch_size=4, root=tmp_path)
    cells = run.table.pivot_table(index="step", columns="quantity", values="value", observed=True).loc[2]
    held = cells[["parameter_bytes", "gradient_bytes", "optimizer_bytes"]].sum()
    assert BLOCK < cells["parameter_bytes"] < held < cells["peak_bytes"] < 1.02 * BLOCK
    written = (run.path / "records.parquet").stat().st_mtime_ns
    few = {"steps": 2, "batch_size": 4}
    job = IsolatedRun.of(wide_bert, task, "lora", few, seed=0, out=None, root=tmp_path, overwrite=False, device="cpu")
    assert measuring._measure_memory(job) == run.path
    assert (run.path / "records.parquet").stat().st_mtime_ns == written


def test_measurement_on_another_device_is_not_reused(bert, task, tmp_path, monkeypatch):
    """Without a card: the model stays on the CPU, and a copy of its run claims another device."""

    def measure(device, out=None, overwrite=False):
        return measuring._measure_memory(IsolatedRun(bert, task, LoRA(), FEW, 0, out, tmp_path, overwrite, device))

    monkeypatch.setattr(isolated_run, "_own_tensors", lambda model, device: None)
    here = measure("cpu")
    there = here.with_name(f"{here.name}-cuda-1")
    shutil.copytree(here, there)
    told = json.loads((there / "run.json").read_text(encoding="utf-8"))
    (there / "run.json").write_text(json.dumps(told | {"device": "cuda:1"}))
    assert measure("cuda:1") == there
    assert measure("cpu") == measure("cpu", out=here) == here
    for device, folder, found in (("cuda:1", here, "cpu"), ("cpu", there, "cuda:1")):
        line = f"cannot reuse {folder}: it was measured on {found}, not on {device}."
        with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
            measure(device, out=folder)
    assert ls.Run.read(measure("cpu", out=there, overwrite=True)).meta.device == "cpu"


def test_lisa_in_the_benchmark_does_not_resample_in_the_measured_step():
    """By default LISA resamples at both of two steps, which drops the state of the blocks that leave."""
    assert ls.LISA().period(2) == 1
    ways = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/memory.py"))["WAYS"]
    assert [way.period(2) >= 2 for way in ways.values() if isinstance(way, ls.LISA)] == [True]


def test_unknown_method_raises_with_the_nearest_name(task):
    with pytest.raises(ValueError, match=r"unknown method 'lorra'.*'lora'"):
        ls.step_memory.measure("minilm", task, "lorra")


def test_live_weights_are_not_copied():
    model = nn.Linear(3, 2)
    base = LiveWeights(model)
    base.capture(torch.optim.SGD(model.parameters()))
    assert base["weight"].data_ptr() == model.weight.data_ptr()


def test_peak_of_full_fine_tuning_includes_all_parts(bert, task, tmp_path):
    """All parts are alive at the optimizer step; the peak excludes lorascope's own copy of W_0."""
    gc.collect()  # garbage of earlier tests would be freed, and subtracted, during the measurement
    measuring._measure_memory(IsolatedRun(bert, task, Full(), FEW, 0, tmp_path / "run", "", False, "cpu"))
    table = ls.Run.read(tmp_path / "run").table
    cells = table.pivot_table(index="step", columns="quantity", values="value", observed=True).loc[2]
    held = memory_estimate.full(memory_estimate.shapes_of(ls.models.load(bert, task=task)))
    assert cells["parameter_bytes"] + cells["gradient_bytes"] + cells["optimizer_bytes"] == sum(astuple(held))
    assert cells["peak_bytes"] >= sum(astuple(held))


@pytest.mark.parametrize("first", [0.9, 0.0])
@pytest.mark.parametrize("rank", [1, 3])
def test_memory_of_adapprox_equals_the_estimate_from_its_ranks(first, rank, task, tmp_path, request):
    """It also stores the RMS of every tensor's direction and, if factored, the angle to the first moment."""
    model = ls.models.load(request.getfixturevalue("bert"), task=task)
    shapes = memory_estimate.shapes_of(model)
    method = ls.Adapprox(betas=(first, 0.999), init_rank=rank, rank_rule="fixed", min_dim=32)
    run = ls.train(model, task, method, observe=[observe.memory(every=1)], out=tmp_path / "run", **FAST)
    last = run.table[run.table["step"] == 3]
    held = memory_estimate.adapprox(shapes, rank, first=first > 0, min_dim=32)
    found = last.loc[last["quantity"] == "optimizer_bytes", "value"].item()
    factored = sum(len(shape) > 1 and min(shape) >= 32 for shape in shapes.values())
    assert found == held.optimizer + 4 * (len(shapes) + (factored if first else 0))


@pytest.mark.parametrize("rule", ["adafactor", "came"])
def test_memory_of_row_column_optimizers_equals_the_estimate(rule, task, tmp_path, request):
    model = ls.models.load(request.getfixturevalue("bert"), task=task)
    shapes = memory_estimate.shapes_of(model)
    method = Full(optimizer_name=rule)
    run = ls.train(model, task, method, observe=[observe.memory(every=1)], out=tmp_path / "run", **FAST)
    last = run.table[run.table["step"] == 3]
    found = last.loc[last["quantity"] == "optimizer_bytes", "value"].item()
    extra = 4 * len(shapes) if rule == "adafactor" else 0  # that of transformers stores the RMS of every weight
    assert found == getattr(memory_estimate, rule)(shapes).optimizer + extra


@pytest.mark.parametrize("moments", memory_estimate.POLICIES)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_memory_of_lisa_equals_the_estimate(moments, family, tmp_path, task, request):
    """Two blocks, one at a time, sampled five times: with "keep", both have state in the end."""
    model = ls.models.load(request.getfixturevalue(family), task=task)
    shapes = memory_estimate.shapes_of(model)
    method = ls.LISA(n_active=1, interval=5, moment_policy=moments)
    run = ls.train(model, task, method, observe=[observe.memory(every=1)], out=tmp_path / "run", **FAST | {"steps": 21})
    for step in (1, 21):
        rows = run.table[run.table["step"] == step].set_index("quantity")["value"]
        reached = int(rows["coverage"])
        held = memory_estimate.lisa(shapes, 1, moments, reached if moments == "keep" else None)
        found = rows[["parameter_bytes", "gradient_bytes", "optimizer_bytes"]].astype(int)
        assert memory_estimate.MemoryUse(*found.tolist()) == held
    assert reached == 2
