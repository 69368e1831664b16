"""Tests of recipes whose parts start from others, and of columns of further test sets."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments import recipe, recipe_table, smoke, sweep
from lorascope.experiments.grid import Job
from lorascope.inputs import models
from lorascope.training.base_weights import prepare_model

RECIPE = """
seeds = 2

[settings]
steps = 3
batch_size = 4
eval_every = 3
device = "cpu"

[[part]]
id = "mnli"
column = "MNLI-m"
metric = "accuracy"
test_columns = {mm = "MNLI-mm"}

[part.task]
name = "rows.csv"
splits = {train = "train", validation = "matched", test = {m = "matched", mm = "mismatched"}}

[[part.method]]
row = "LoRA"
name = "lora"
rank = 2
lr = 0.01

[[part]]
start = "mnli"
column = "MRPC"
metric = "accuracy"
task = {name = "pairs.csv", splits = {train = "train", validation = "matched", test = "matched"}}

[[part.method]]
row = "LoRA"
name = "lora"
rank = 2

[[part]]
column = "MRPC"
metric = "accuracy"
task = {name = "pairs.csv", splits = {train = "train", validation = "matched", test = "matched"}}

[[part.method]]
row = "LoRA, without the start"
name = "lora"
rank = 2
"""


def write_recipe(folder, text=RECIPE):
    """Write a recipe and its data, and return its file."""
    rows = []
    for number in range(60):
        source = ("train", "matched", "mismatched")[number % 3]
        # A third of the labels of the last split do not follow from the text.
        label = ("bad", "good")[number // 3 % 2]
        word = label if source != "mismatched" or number % 9 else "film"
        rows.append({"text": f"{word} film {number}", "label": label, "split": source})
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    table = pd.DataFrame(rows)
    table.assign(text="pair " + table["text"]).to_csv(folder / "pairs.csv", index=False)
    file = folder / "own.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def own_recipe(tmp_path, monkeypatch, bert):
    """Return the file of a recipe with a start, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path, f'model = "{bert}"\n' + RECIPE)


def test_a_run_with_a_start_equals_one_that_train_starts_from_the_same_seed(own_recipe, capsys):
    assert main(["sweep", str(own_recipe), "--json", "--no-progress", "--jobs", "1"]) == 0
    cells = pd.DataFrame(json.loads(capsys.readouterr().out)).set_index(["column", "row", "evaluation"])
    plan = recipe.read(own_recipe)
    runs = recipe_table.find_runs(plan)
    assert list(runs) == [job.name for job in plan.jobs()]
    for seed in (0, 1):
        source = runs[f"LoRA, MNLI-m, seed {seed}"]
        started = runs[f"LoRA, MRPC, seed {seed}"]
        assert started.meta.start.run == source.id
        assert runs[f"LoRA, without the start, MRPC, seed {seed}"].meta.start is None
        (job,) = [job for job in plan.jobs() if job.name == f"LoRA, MRPC, seed {seed}"]
        settings = {**job.settings, "root": "other", "progress": False}
        again = ls.train(job.model, job.data, job.method, start=source, **settings)
        assert again.id == started.id
        for name, array in again.tensors("last").items():
            np.testing.assert_array_equal(array, started.tensors("last")[name])
    table = ls.recipes.table(own_recipe)
    assert list(table["mean"]) == pytest.approx(list(cells["mean"]))
    assert list(ls.recipes.table(own_recipe, runs.values())["n"]) == list(cells["n"])
    # Without the runs that they start from, the others are not of this recipe.
    started = [runs[f"LoRA, MRPC, seed {seed}"] for seed in (0, 1)]
    assert not ls.recipes.table(own_recipe, started)["n"].any()
    # The further test set has the score of the tested state.
    scores = [100 * runs[f"LoRA, MNLI-m, seed {seed}"].meta.test.groups["mm"] for seed in (0, 1)]
    assert cells.loc[("MNLI-mm", "LoRA", "test"), "mean"] == pytest.approx(np.mean(scores))
    assert cells.loc[("MNLI-mm", "LoRA", "test"), "n"] == 2
    assert {row for column, row, _ in cells.index if column == "MRPC"} == {"LoRA", "LoRA, without the start"}


def test_a_second_call_trains_nothing_and_finds_the_same_starts(own_recipe, tmp_path, capsys):
    assert main(["sweep", str(own_recipe), "--json", "--no-progress", "--jobs", "1"]) == 0
    before = capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("own/*/run.json")}
    assert len(files) == 6
    assert main(["sweep", str(own_recipe), "--json", "--no-progress", "--jobs", "1"]) == 0
    assert capsys.readouterr().out == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("own/*/run.json")} == files


def test_a_failed_start_fails_its_dependents_with_one_line_each(tmp_path, bert):
    settings = {"steps": 2, "batch_size": 4, "root": str(tmp_path / "runs"), "max_length": 32, "seed": 0}
    task = ls.tasks.load("sentiment")

    def no_model() -> torch.nn.Module:
        raise OSError("no such model")

    jobs = [
        Job(no_model, task, ls.LoRA(rank=2), settings, "first"),
        Job(bert, task, ls.LoRA(rank=2), settings, "second", start="first"),
        Job(bert, task, ls.LoRA(rank=2), settings, "third", start="second"),
        Job(bert, task, ls.LoRA(rank=1), settings, "free"),
    ]
    swept = sweep.run_jobs(jobs, workers=1, progress=False)
    assert swept.complaints() == [
        "first: OSError: no such model",
        "second: its start failed: first",
        "third: its start failed: second",
    ]
    assert swept.finished_names == ["free"]


def test_smoke_runs_have_the_starts_and_the_test_columns(own_recipe, capsys):
    assert main(["sweep", str(own_recipe), "--smoke", "--json", "--no-progress", "--jobs", "1"]) == 0
    cells = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert set(cells["column"]) == {"MNLI-m", "MNLI-mm", "MRPC"}
    assert (cells["n"] == 1).all()
    runs = recipe_table.find_runs(recipe.read(own_recipe, smoke=True))
    assert runs["LoRA, MRPC, seed 0"].meta.start.run == runs["LoRA, MNLI-m, seed 0"].id


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('start = "mnli"', 'start = "rte"', "part MRPC: start 'rte' must be the id of a part"),
        ('start = "mnli"', 'start = 3', "part MRPC: start must be a string, got 3"),
        ('id = "mnli"', "", "part MRPC: start 'mnli' must be the id of a part"),
        ('start = "mnli"', 'id = "mnli"', "part MRPC: duplicate id 'mnli'"),
        ('row = "LoRA"', 'row = "LoRA, rank 2"', "part MRPC: start 'mnli' must have row 'LoRA' with method lora"),
        ('name = "lora"\nrank = 2', 'name = "dora"\nrank = 2', "part MRPC: start 'mnli' must have row 'LoRA'"),
        ('start = "mnli"', 'start = "mnli"\nseeds = 3', "start 'mnli' must have the same seeds, but seed 2 is missing"),
        ('start = "mnli"', 'start = "mnli"\nmodel = "minilm"', "part MRPC: start 'mnli' must have the same model"),
        ('{mm = "MNLI-mm"}', '{m = "MNLI-mm"}', "part MNLI-m: unknown test set 'm'; did you mean 'mm'?"),
        ('{mm = "MNLI-mm"}', '{mm = 3}', "part MNLI-m: test_columns must be a table, got {'mm': 3}"),
        ('{mm = "MNLI-mm"}', '{mm = "MNLI-m"}', "duplicate row 'LoRA' of column 'MNLI-m'"),
    ],
)  # fmt: skip
def test_a_wrong_start_or_test_column_is_one_line(own_recipe, capsys, old, new, message):
    text = own_recipe.read_text()
    assert old in text
    own_recipe.write_text(text.replace(old, new, 1))
    assert main(["sweep", str(own_recipe)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_own_recipe_has_printed_numbers_of_other_papers(own_recipe):
    cells = """
[[printed]]
row = "LoRA"
column = "MNLI-mm"
value = 90.5
sd = 0.2
n = 5

[[printed]]
row = "LoRA"
column = "MRPC"
value = 89
"""
    text = own_recipe.read_text()
    own_recipe.write_text(text + cells)
    table = ls.recipes.table(own_recipe).set_index(["column", "row"])
    printed = table.loc[[("MNLI-mm", "LoRA")], ["printed", "printed_sd", "printed_n"]]
    assert printed.to_numpy().tolist() == [[90.5, 0.2, 5.0]]
    assert table.loc[("MRPC", "LoRA"), "printed"].tolist() == [89.0, 89.0]
    assert table.loc[[("MNLI-m", "LoRA")], "printed"].isna().all()
    assert not recipe.read(own_recipe, smoke=True).recipe_parts[1].rows[0].printed
    own_recipe.write_text(text + cells.replace("MRPC", "RTE"))
    message = "printed must be of a row and a column of the table, got row 'LoRA' of column 'RTE'$"
    with pytest.raises(ValueError, match=message):
        recipe.read(own_recipe)
    own_recipe.write_text(text + cells.replace("value = 89", 'value = "89"'))
    with pytest.raises(ValueError, match=r"printed.*value"):
        recipe.read(own_recipe)


TRAIN_ROWS = {
    "MNLI": 392_702, "SST-2": 67_349, "MRPC": 3_668, "CoLA": 8_551, "QNLI": 104_743, "QQP": 363_846, "RTE": 2_490,
    "STS-B": 5_749,
}  # fmt: skip


def test_stand_ins_of_all_tasks_have_the_same_base_weights():
    stand_in = smoke.Smoke("roberta")
    hashes = set()
    for entry in ({"name": "classes"}, {"name": "numbers", "kind": "regression"}):
        task = stand_in.task(entry)
        hashes.add(prepare_model(models.load(stand_in.model(), task), task, seed=0).w0_hash)
    assert len(hashes) == 1


def test_arms_of_lora_table2_have_the_steps_of_scripts_and_of_the_paper():
    table = recipe.grid.read_toml(recipe.find_recipe("lora-table2"))
    steps = dict.fromkeys(("LoRA, as in the scripts", "LoRA, as printed"), 0)
    for part in table["part"]:
        task, size = part["column"].split(", ")
        if size == "base":
            settings = part["settings"]
            steps[part["method"][0]["row"]] += settings["epochs"] * -(-TRAIN_ROWS[task] // settings["batch_size"])
    # A batch per GPU is eight times smaller than that of a step: 1.7 instead of 0.2 million steps.
    assert steps == {
        "LoRA, as in the scripts": pytest.approx(0.2e6, rel=0.1),
        "LoRA, as printed": pytest.approx(1.7e6, rel=0.03),
    }


def test_parts_of_lora_table2_start_from_mnli_with_the_same_model_and_arm():
    plan = recipe.read("lora-table2", smoke=True)
    started = [job for job in plan.jobs() if job.start]
    assert len(started) == 3 * 2 * 2
    for job in started:
        row, _, size = re.fullmatch(r"(.*), (MRPC|RTE|STS-B), (base|large), seed 0", job.name).groups()
        assert job.start == f"{row}, MNLI, {size}, seed 0"
