"""The table of benchmarks/gpu.py, made on the CPU from tiny models."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

import pytest
import torch

from lorascope import methods
from lorascope.experiments import step_memory
from lorascope.experiments.isolated_run import IsolatedRun
from lorascope.methods import Full, LoRA
from lorascope.runs.run import Run


@pytest.fixture
def gpu(monkeypatch):
    """The script; memory is measured in this process, since a fresh one takes seconds to import torch."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")

    def here(work, model, data, method, steps, **where):
        settings = {key: where.pop(key) for key in ("batch_size", "max_length")}
        gc.collect()  # what earlier tests left would be freed amid the measurement, and subtracted
        return Run.read(work(IsolatedRun.of(model, data, method, settings | {"steps": steps}, **where)))

    monkeypatch.setattr(step_memory, "run_in_own_process", here)
    yield importlib.import_module("gpu")
    for name in ("gpu", "recorder", "minilm_step", "paired"):
        sys.modules.pop(name)


@pytest.fixture
def toy(task, tmp_path) -> str:
    file = tmp_path / "toy.csv"
    task.table[["text", "label", "group"]].to_csv(file, index=False)
    return str(file)


@pytest.mark.slow
def test_the_table_has_a_row_per_method_recorder_and_decoder(gpu, toy, bert, llama, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "METHODS", {"full": Full(), "lora": LoRA()})
    made: list = []
    monkeypatch.setattr(gpu, "table", lambda found, table=gpu.table: made.append(table(found)) or made[-1])
    gpu.main(["--device", "cpu", "--quick", "--model", bert, "--decoder", llama, "--task", toy])
    found = made[0].set_index("")
    assert capsys.readouterr().out.count("\n") == len(found) + 3
    trained = [*gpu.METHODS]
    assert list(found.index) == [*trained, "full, recorded", "lora, recorded", f"lora, {llama}, bf16"]
    assert found["max allocated (MiB)"].isna().all()
    assert (found.loc[trained, "lorascope.step_memory (MiB)"] > 0).all()
    milliseconds, ratio = found["ms per step"], found.loc[trained, "ratio"]
    assert (milliseconds > 0).all()
    assert ratio["full"] == 1
    assert ratio.to_numpy() == pytest.approx((milliseconds[trained] / milliseconds["full"]).to_numpy())


def test_every_method_has_a_single_phase(gpu, fresh_bert):
    assert {name: method.name for name, method in gpu.METHODS.items()} == {name: name for name in methods.METHODS}
    for method in gpu.METHODS.values():
        assert next(method.phases(dict(fresh_bert.named_parameters()))).method is method
    steps = gpu.SIZES[0]
    assert gpu.METHODS["lisa"].period(steps) < steps  # resamples blocks within the timed steps
    assert gpu.METHODS["lisa"].period(2) >= 2  # and not in those that memory measures


def test_without_a_cuda_device_there_is_one_line(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    assert capsys.readouterr().out == "no CUDA device: nothing to measure\n"
