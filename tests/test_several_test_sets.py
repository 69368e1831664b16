"""Tests of tasks with several test sets, such as the matched and mismatched ones of MNLI."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import torch

import lorascope as ls
from lorascope.experiments import grid, recipe
from lorascope.inputs import models, tasks
from lorascope.training.run_spec import reload_task

SOURCES = ("train", "matched", "mismatched")
MAPPING = {"train": "train", "validation": "matched", "test": {"m": "matched", "mm": "mismatched"}}
SETTINGS = {"steps": 6, "batch_size": 8, "eval_every": 2, "progress": False, "device": "cpu", "lr": 1e-2}


def table(rows: int = 240) -> pd.DataFrame:
    """Return texts whose labels follow from a word in two splits, and from another word in the third."""
    lines = []
    for number in range(rows):
        source = SOURCES[number % 3]
        label = ("negative", "positive")[number % 7 % 2]
        word = label if source != "mismatched" or number % 4 else "film"
        lines.append({"text": f"the {word} film was {number}", "label": label, "split": source})
    return pd.DataFrame(lines)


def accuracy(model, task, split):
    """Return the accuracy on a split, row by row."""
    rows = task.split(split)
    tokenizer = models.tokenizer(model)
    right = 0
    model.eval()
    with torch.no_grad():
        for text, label in zip(rows["text"], rows["label"], strict=True):
            logits = model(**tokenizer(text, return_tensors="pt")).logits
            right += task.labels[int(logits.argmax())] == label
    return right / len(rows)


def test_each_test_set_has_the_rows_of_its_source():
    rows = table()
    task = tasks.from_frame(rows, splits=MAPPING)
    assert (task.test_sets, task.other_tests, task.selected_on_test) == (("m", "mm"), {"mm": "test:mm"}, True)
    for split, source in {
        "train": "train",
        "validation": "matched",
        "test": "matched",
        "test:mm": "mismatched",
    }.items():
        assert set(task.split(split)["text"]) == set(rows["text"][rows["split"] == source])
    one = tasks.from_frame(rows, splits=MAPPING | {"test": "matched"})
    assert one.hash != task.hash
    assert one.test_sets == ()
    assert tasks.from_frame(rows, splits=MAPPING | {"test": {"m": "matched"}}).hash == one.hash


@pytest.mark.parametrize("test_state", ["last", "best"])
def test_a_run_has_the_metric_of_each_test_set(test_state, bert, tmp_path):
    task = tasks.from_frame(table(), splits=MAPPING)
    model = models.load(bert, task=task)
    run = ls.train(model, task, "lora", test_state=test_state, root=tmp_path, **SETTINGS)
    state = "best" if test_state == "best" else "last"
    fresh = models.load(bert, task=task)
    run.restore(fresh, state=state)
    expected = {"m": accuracy(fresh, task, "test"), "mm": accuracy(fresh, task, "test:mm")}
    assert run.meta.test.groups == pytest.approx(expected)
    assert run.meta.test.metric == run.meta.test.groups["m"]
    assert expected["m"] != expected["mm"]
    values = run.table[run.table["quantity"] == "test_metric_group"]["value"]
    assert values.to_list() == pytest.approx(list(expected.values()))
    # Intervals and other metrics follow from the predictions on the first set.
    assert len(run.predictions) == len(task.split("test"))


def test_a_causal_model_has_the_metric_of_each_test_set(gpt2, tmp_path):
    task = tasks.from_frame(table(), splits=MAPPING)
    run = ls.train(gpt2, task, "lora", metric=("accuracy", "f1"), root=tmp_path, **SETTINGS)
    assert run.meta.test.groups.keys() == {"m", "mm"}
    assert run.meta.test.values["accuracy"] == run.meta.test.groups["m"]


def test_a_run_from_a_file_stores_the_test_sets_and_reopens_them(bert, tmp_path):
    rows = tmp_path / "rows.csv"
    table().to_csv(rows, index=False)
    task = tasks.load(rows, splits=MAPPING)
    run = ls.train(bert, task, "lora", keep_checkpoints=[3], root=tmp_path, **SETTINGS)
    assert run.meta.task_options == {"splits": MAPPING}
    reopened = reload_task(ls.load(run.path), str(rows))
    assert (reopened.hash, reopened.test_sets) == (task.hash, ("m", "mm"))
    fork = ls.fork(run, step=3, model=bert, progress=False)
    assert fork.meta.test.groups == run.meta.test.groups


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ({}, "splits: test must be a split, or a part such as 'train[10%:]', got {}"),
        ({"m": "matched", "mm": 3}, "splits: test:mm must be a split, or a part such as 'train[10%:]', got 3"),
        (
            {"m": "matched", "mm": "dev"},
            "splits: unknown split 'dev' of x.csv; expected one of train, matched, mismatched",
        ),
        (
            {"m": "matched", "mm": "train[:10%]"},
            "cannot use splits of x.csv: 8 rows of train are also in test:mm, the first is row N",
        ),
        (
            {"m": "mismatched", "mm": "matched"},
            "cannot use splits of x.csv: 80 rows of validation are also in test:mm, the first is row N",
        ),
    ],
)
def test_invalid_test_sets_raise_one_line(test, expected):
    with pytest.raises(ValueError, match="split") as caught:
        tasks.from_frame(table(), "x.csv", splits=MAPPING | {"test": test})
    assert re.sub(r"row \d+$", "row N", str(caught.value)) == expected


def test_test_sets_of_a_table_with_groups_raise():
    with pytest.raises(ValueError, match=r"^splits: test must be one split, because x\.csv has groups$"):
        tasks.from_frame(table().assign(group="film"), "x.csv", splits=MAPPING)


def test_an_unknown_test_set_of_a_task_raises():
    task = tasks.from_frame(table(), splits=MAPPING)
    with pytest.raises(ValueError, match="expected one of train, validation, test, test:mm, search"):
        task.split("test:other")


def test_sweeps_and_recipes_read_test_sets(bert, tmp_path):
    rows = tmp_path / "rows.csv"
    table().to_csv(rows, index=False)
    (tmp_path / "own.toml").write_text(f"""
model = "{bert}"
seeds = 1
[settings]
steps = 2
[[part]]
column = "MNLI-m"
metric = "accuracy"
[part.task]
name = "{rows}"
splits = {{train = "train", validation = "matched", test = {{m = "matched", mm = "mismatched"}}}}
[[part.method]]
row = "LoRA"
name = "lora"
""")
    part = recipe.read(tmp_path / "own.toml").recipe_parts[0]
    assert part.grid.tasks[0].test_sets == ("m", "mm")
    smoke = recipe.read(tmp_path / "own.toml", smoke=True).recipe_parts[0]
    assert smoke.grid.tasks[0].test_sets == ("m", "mm")
    sweep = grid.read({"task": {"name": str(rows), "splits": MAPPING}, "method": "lora", "settings": {"steps": 1}})
    assert sweep.tasks[0].test_sets == ("m", "mm")
    with pytest.raises(ValueError, match=r"^task: splits must be"):
        grid.load_task({"name": str(rows), "splits": {"train": "train", "validation": "matched", "test": ["matched"]}})
