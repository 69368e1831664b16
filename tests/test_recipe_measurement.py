"""Tests of measured costs of a recipe: which runs are measured, their seconds, memory and hours, and errors."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lorascope.cli.main import main
from lorascope.experiments import recipe, recipe_check, recipe_measurement, smoke, step_memory, step_time
from lorascope.experiments.sweep import train_job
from lorascope.inputs import models

RECIPE = """
seeds = 3
settings = {epochs = 2, batch_size = 4, max_length = 24, device = "cpu"}
model = "encoder"

[[part]]
column = "rows"
metric = "accuracy"
task = {name = "rows.csv", splits = {train = "train", validation = "dev", test = "dev"}}

[[part.method]]
row = "LoRA"
name = "lora"
rank = 2

[[part.method]]
row = "LoRA, other rate"
name = "lora"
rank = 2
lr = 0.01

[[part.method]]
row = "AdaLoRA"
name = "adalora"
initial_steps = 800
final_steps = 3500
init_rank = 3
target_rank = 2

[smoke.methods.adalora]
initial_steps = 1
final_steps = 1
"""


@pytest.fixture
def own_recipe(tmp_path, monkeypatch):
    """Return the file of a recipe with data, whose model has a configuration and a tokenizer, but no weights."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smoke.Smoke().model(), tmp_path / "encoder")
    (tmp_path / "encoder" / "model.safetensors").unlink()
    rows = [{"text": f"word{n}", "split": ("train", "dev")[n % 2], "label": "ab"[n // 2 % 2]} for n in range(40)]
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    file = tmp_path / "own.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def made_up_costs(monkeypatch):
    """Replace the measurements by seconds that are 9 in the first two steps, then 0.5, and by 3 MiB; list the calls."""
    calls = []

    def seconds(model, task, method, *, steps, **options):
        calls.append((model, task, method, options))
        table = []
        for step in range(1, steps + 1):
            value = 9.0 if step <= 2 else 0.5
            for part, share in {"forward": 0.25, "backward": 0.5, "rest": 0.25}.items():
                table.append({"quantity": f"{part}_seconds", "step": step, "value": share * value})
        return SimpleNamespace(table=pd.DataFrame(table))

    def memory(model, task, method, *, steps, **options):
        calls.append((model, task, method, options))
        return SimpleNamespace(table=pd.DataFrame([{"quantity": "peak_bytes", "step": steps, "value": 3.0 * 2**20}]))

    monkeypatch.setattr(step_time, "measure", seconds)
    monkeypatch.setattr(step_memory, "measure", memory)
    return calls


def test_equal_models_lengths_and_methods_are_measured_once(own_recipe, made_up_costs, capsys):
    assert main(["sweep", str(own_recipe), "--check", "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 20 rows in batches of 4, 2 epochs and 3 seeds: 30 steps of half a second. The first two steps do not count.
    measured = "    measured: 0.5 s a step, peak 3 MiB with rows of full length, 0.00417 hours for all runs"
    assert lines.count(measured) == 3
    assert lines[-2:] == [
        "total", "  0.0125 hours of training steps on cpu, one run at a time; 2 measurements of 20 steps",
    ]  # fmt: skip
    assert [call[2].name for call in made_up_costs] == ["lora", "lora", "adalora", "adalora"]
    # The schedule of the recipe is longer than the measurement.
    assert made_up_costs[2][2].initial_steps == 1
    timed, metered = made_up_costs[0][1], made_up_costs[1][1]
    assert set(timed.table["text"]) <= {f"word{number}" for number in range(40)}
    tokenizer = models.tokenizer(models.outline("encoder"))
    assert min(len(tokenizer.tokenize(text)) for text in metered.table["text"]) >= 24
    assert not Path("runs").exists()


def test_runs_without_data_are_measured_at_full_length_and_have_no_hours(own_recipe, made_up_costs, capsys):
    Path("rows.csv").unlink()
    assert main(["sweep", str(own_recipe), "--check", "--measure"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        "    measured: 0.5 s a step, peak 3 MiB with rows of full length, "
        "seconds of rows of full length, because the data are missing"
    ) in lines
    assert lines[-1].startswith("  0 hours of training steps on cpu, one run at a time; without 1 part whose steps")


def test_a_failed_measurement_is_a_problem_of_its_row(own_recipe, made_up_costs, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(step_memory, "measure", fails)
    assert main(["sweep", str(own_recipe), "--check", "--measure"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "lorascope: rows: LoRA cannot be measured: CUDA out of memory"
    assert len(errors) == 3


def test_measure_requires_check(own_recipe, capsys):
    assert main(["sweep", str(own_recipe), "--measure"]) == 2
    assert "--measure requires --check" in capsys.readouterr().err


def test_outline_on_a_device_has_random_weights_of_the_shapes_on_meta(own_recipe):
    shapes, drawn = models.outline("encoder"), models.outline("encoder", device="cpu")
    assert {name: weight.shape for name, weight in drawn.named_parameters()} == {
        name: weight.shape for name, weight in shapes.named_parameters()
    }
    assert {weight.dtype for weight in drawn.parameters()} == {torch.float32}
    again = models.outline("encoder", device="cpu")
    for name, weight in drawn.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))


@pytest.mark.slow
def test_peak_has_weights_gradients_and_moments_of_a_run(own_recipe):
    text = RECIPE[: RECIPE.index('[[part.method]]\nrow = "LoRA, other rate"')]
    own_recipe.write_text(text)
    meter = recipe_measurement.CostMeter("cpu")
    shutil.copy(Path(smoke.Smoke().model()) / "model.safetensors", "encoder")
    (job, *_) = recipe.read(own_recipe).jobs()
    stand_in = recipe.read(own_recipe, smoke=True).recipe_parts[0].grid.tasks[0]
    cost = meter.measure("encoder", job, stand_in, job.method)
    parameters = train_job(job).meta.parameters
    assert cost.peak_bytes > 4 * (parameters.total + 3 * parameters.trained)
    assert 0 < cost.seconds < 60
    assert meter.measure("encoder", job, stand_in, job.method) is cost


def test_check_without_measure_has_no_measured_lines(own_recipe, made_up_costs):
    needs = recipe_check.check(own_recipe)
    assert not re.search("measured|hours", str(needs[0].lines))
    assert made_up_costs == []
