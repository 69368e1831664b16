"""Training on a CUDA device compared with the CPU; without such a device the CPU is compared with itself."""

from __future__ import annotations

import importlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_tokenizer
from examples import EXAMPLES
from forks import same
from tiny import tiny
from torch import nn
from torch.nn import functional as F

import lorascope as ls
from lorascope import observe
from lorascope.adapters.delta import attached_deltas, host_weight
from lorascope.experiments.isolated_run import IsolatedRun
from lorascope.inputs import models
from lorascope.methods.hydralora import RoutedDelta

CARD = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")]
)
DEVICES = ["cpu", CARD]
EVERYWHERE = {"targets": "all-linear"}
ADAPTERS = {
    "lora": ls.LoRA(rank=3, dropout=0.0, **EVERYWHERE),
    "adalora": ls.AdaLoRA(init_rank=3, target_rank=2),
    "autolora": ls.AutoLoRA(rank=3, **EVERYWHERE),
    "alora": ls.ALoRA(init_rank=2),
    "fourierft, few": ls.FourierFT(coefficients=4, **EVERYWHERE),
    "fourierft, many": ls.FourierFT(coefficients=400, **EVERYWHERE),
    "fourierft, random": ls.FourierFT(coefficients=40, basis="random", **EVERYWHERE),
    "hydralora, uniform": ls.HydraLoRA(rank=2, router="uniform"),
    "hydralora": ls.HydraLoRA(rank=2),
}
SETTINGS = {"steps": 4, "batch_size": 8, "eval_every": 2, "eval_size": 16, "test_size": 16, "progress": False}


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def still_bert(tmp_path_factory) -> str:
    """A tiny BERT without dropout, whose draws differ between devices."""
    path = tmp_path_factory.mktemp("models") / "still"
    tiny("bert", "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def hosts(name: str, device: str) -> dict[str, nn.Module]:
    """The modules that a method adapts, with random adapters, on a device."""
    model = tiny("bert").to(device)
    ADAPTERS[name].attach(model)
    generator = torch.Generator().manual_seed(0)
    for delta in attached_deltas(model).values():
        for tensor in [*delta.parameters(), *(getattr(delta, "logits", None),)]:
            if tensor is not None:
                tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return {module: model.get_submodule(module) for module in attached_deltas(model)}


def given(host: nn.Module, device: str) -> torch.Tensor:
    size = (5, 7, host_weight(host).shape[1])
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device)


def folded(host: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """By one matrix per module, or where experts are weighted by the input by a matrix of each."""
    delta, weight, bias = host.delta, host_weight(host), getattr(host, "bias", None)
    if not isinstance(delta, RoutedDelta):
        return F.linear(x, weight + delta.weight(), bias)
    gates = (x @ delta.router.T).softmax(-1)
    experts = [delta.scale * B @ delta.A for B in delta.B.chunk(delta.number, dim=1)]
    return F.linear(x, weight, bias) + sum(
        gates[..., i, None].to(x.dtype) * F.linear(x, expert) for i, expert in enumerate(experts)
    )


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(ADAPTERS))
@torch.no_grad()
def test_forward_equals_the_folded_weight_on_every_device(name, device):
    for module, host in hosts(name, device).items():
        x = given(host, device)
        plain = F.linear(x, host_weight(host), getattr(host, "bias", None))
        assert error(host(x), plain) > 1e-2, module
        assert error(host(x), folded(host, x)) < 1e-6, module
        with torch.autocast(device, torch.bfloat16):
            assert host(x).dtype == torch.bfloat16
            assert error(host(x), folded(host, x)) < 2**-7, module


@pytest.mark.parametrize("device", [CARD])
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_forward_does_not_wait_for_the_device(name, device):
    for host in hosts(name, device).values():
        x = given(host, device)
        host(x)  # what is made once may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            host(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Noise of 2e-7 in every product moves losses by 2e-7 and norms by 2e-5 (measured); other kernels get room beyond it.
LOSSES, NORMS = 1e-5, 1e-3
# ALoRA prunes components whose scores nearly tie; Adapprox draws its sketches on the device.
APART = {"alora": 1e-3, "adapprox": 1e-3}


@pytest.mark.parametrize(
    ("name", "device"), [("lora", "cpu"), *(pytest.param(name, "cuda", marks=CARD.marks) for name in EXAMPLES)]
)
def test_a_training_on_a_device_records_what_it_records_on_the_cpu(name, device, still_bert, task, tmp_path):
    observers = [
        observe.norms(every=1),
        observe.factors(every=2),
        observe.neurons(every=2),
        observe.utilization(every=2),
    ]

    method = EXAMPLES[name]
    if hasattr(method, "dropout"):
        method = replace(method, dropout=0.0)

    def train(device: str) -> tuple[ls.Run, nn.Module]:
        model = models.load(still_bert, task=task)
        where = {"device": device, "out": tmp_path / f"{len(list(tmp_path.iterdir()))}"}
        return ls.train(model, task, method, observe=observers, **SETTINGS, **where), model

    here, (there, model) = train("cpu")[0], train(device)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert there.meta.device == device
    tables = [run.table.set_index(["step", "quantity", "module", "index"])["value"] for run in (here, there)]
    pd.testing.assert_index_equal(tables[0].index, tables[1].index)
    for quantity in ("loss", "eval_loss", "weight_norm", "update_norm", "step_norm"):
        wanted, found = (table.xs(quantity, level="quantity").to_numpy() for table in tables)
        if quantity.endswith("loss"):
            assert found == pytest.approx(wanted, rel=APART.get(name, LOSSES)), quantity
        elif name not in APART:
            assert found == pytest.approx(wanted, rel=NORMS, abs=1e-6), quantity
    losses = tables[0].xs("loss", level="quantity")
    assert np.ptp(losses) > 100 * LOSSES * losses.max()  # else the comparison would say little
    fresh = models.load(still_bert, task=task)
    there.restore(fresh)
    batch = task.fit(fresh).encode(models.processor(fresh), task.split("test")).batch(range(5))
    assert torch.equal(fresh(**batch).logits, model.cpu()(**batch).logits)


@pytest.fixture
def deterministic(monkeypatch):
    """Kernels without atomic additions, which round differently each time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "device"), [("lora", "cpu"), *(pytest.param(n, "cuda", marks=CARD.marks) for n in ("lora", "adapprox"))]
)
def test_an_interrupted_run_resumes_bit_for_bit(name, device, bert, task, tmp_path, monkeypatch, deterministic):
    """With dropout, whose draws belong to the generator of the device."""
    method = EXAMPLES[name]
    settings = {**SETTINGS, "device": device, "observe": [observe.norms(every=1)]}
    ls.train(models.load(bert, task=task), task, method, out=tmp_path / "whole", **settings)
    before_step, pressed = type(method).before_step, []

    def press(self, step):
        if step.index == 1 and not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
        before_step(self, step)

    monkeypatch.setattr(type(method), "before_step", press)
    with pytest.raises(KeyboardInterrupt):
        ls.train(models.load(bert, task=task), task, method, out=tmp_path / "out", **settings)
    assert list((tmp_path / "out/resume").glob("step-*"))
    ls.train(models.load(bert, task=task), task, method, out=tmp_path / "out", **settings)
    same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_autocast_trains_fp32_weights_without_a_scaler(device, bert, task, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("bf16 has the range of fp32")

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", refuse)
    model = models.load(bert, task=task)
    run = ls.train(model, task, EXAMPLES["lora"], precision="bf16", device=device, out=tmp_path / "run", **SETTINGS)
    losses = run.table.query("quantity == 'loss'")["value"]
    assert len(losses) == SETTINGS["steps"]
    assert np.isfinite(losses).all()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("device", [CARD])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_memory_reports_the_peak_that_cuda_counts(name, device, task, tmp_path, monkeypatch):
    """A model of 100 MiB, compared with which the workspaces of the libraries are small; in two processes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    gpu = importlib.import_module("gpu")
    tiny("bert", "base", vocab_size=100 * 2**20 // 4 // 32).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    where = {"seed": 0, "out": None, "root": tmp_path, "overwrite": False, "device": device}
    job = IsolatedRun.of(str(tmp_path / "wide"), task, EXAMPLES[name], {"steps": 3, "batch_size": 8}, **where)
    _, allocated = gpu.with_peak(device, lambda: ls.Run.read(gpu.step_time._measure_seconds(job)))
    run = ls.step_memory.measure(str(tmp_path / "wide"), task, EXAMPLES[name], batch_size=8, **where)
    last = run.table[run.table["step"] == run.table["step"].max()].set_index("quantity")["value"]
    parts = last["parameter_bytes"] + last["gradient_bytes"] + last["optimizer_bytes"]
    assert parts <= last["peak_bytes"]
    assert last["peak_bytes"] == pytest.approx(allocated, rel=0.05)
