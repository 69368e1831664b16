"""Tests of trainings whose length is a number of epochs: steps, batches, evaluations and errors."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments import grid
from lorascope.inputs import models, tasks
from lorascope.training.base_weights import prepare_model
from lorascope.training.session import Session
from lorascope.training.settings import Settings

ROWS = 21
"""Training rows of the task: three batches, of which the last one has 5 rows."""
SETTINGS = {"epochs": 2, "batch_size": 8, "schedule": "constant", "warmup": 0, "progress": False, "clip": None}


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    splits = ["train"] * ROWS + ["validation"] * 6 + ["test"] * 6
    texts = [f"{number} {'good' if number % 2 else 'bad'} film" for number in range(len(splits))]
    labels = [("negative", "positive")[number % 2] for number in range(len(splits))]
    return tasks.from_frame(pd.DataFrame({"text": texts, "label": labels, "split": splits}))


@pytest.fixture
def batches(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """Record the batches of a training."""
    recorded = []
    draw = Session.batch

    def record(session, index):
        recorded.append(draw(session, index))
        return recorded[-1]

    monkeypatch.setattr(Session, "batch", record)
    return recorded


def load_without_dropout(bert, task):
    model = models.load(bert, task=task)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_epochs_visit_every_row_once_in_the_order_of_their_permutation(bert, task, batches, tmp_path):
    model = models.load(bert, task=task)
    run = ls.train(model, task, "lora", seed=3, out=tmp_path / "run", **SETTINGS)
    assert run.meta.settings["steps"] == 6
    assert run.meta.settings["epochs"] == 2.0
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 5, 8, 8, 5]
    rows = task.split("train")
    ids = models.processor(model)(rows["text"].to_list(), padding=True, return_tensors="pt")["input_ids"]
    for epoch in range(2):
        order = np.random.default_rng([3, epoch]).permutation(ROWS)
        lines = [line for batch in batches[3 * epoch : 3 * epoch + 3] for line in batch["input_ids"]]
        visited = [line[line != 0].tolist() for line in lines]
        assert visited == [ids[row][ids[row] != 0].tolist() for row in order]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_weights_equal_a_plain_loop_over_the_same_batches(bert, task, batches, tmp_path, accumulate):
    model, reference = load_without_dropout(bert, task), load_without_dropout(bert, task)
    ls.train(model, task, "full", lr=1e-3, head_lr=1e-3, accumulate=accumulate, out=tmp_path / "run", **SETTINGS)
    prepare_model(reference, task, 0)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    reference.train()
    for batch in batches:
        optimizer.zero_grad()
        reference(**batch).loss.backward()
        optimizer.step()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        # Sums over pieces of a batch are rounded otherwise than its mean, and AdamW divides by small gradients.
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_evaluation_after_each_epoch(bert, task, tmp_path):
    run = ls.train(models.load(bert, task=task), task, "lora", eval_every="epoch", out=tmp_path / "run", **SETTINGS)
    table = run.table
    assert sorted(table["step"][table["quantity"] == "eval_loss"]) == [0, 3, 6]


def test_part_of_an_epoch(bert, task, tmp_path):
    settings = SETTINGS | {"epochs": 0.5}
    run = ls.train(models.load(bert, task=task), task, "lora", out=tmp_path / "run", **settings)
    assert run.meta.settings["steps"] == 2


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("epochs", [1, 2.5, 3])
def test_steps_equal_the_number_of_batches(rows, epochs):
    settings = Settings(steps=0, epochs=epochs, lr=1e-3, head_lr=1e-3, batch_size=8).resolve(rows)
    # Trainer.set_initial_training_values of transformers, with one batch per update.
    assert settings.steps == math.ceil(epochs * -(-rows // 8))


def test_epochs_of_a_phase_are_over_its_own_rows(bert, tmp_path):
    texts = [f"text number {number}" for number in range(200)]
    task = tasks.from_frame(pd.DataFrame({"text": texts, "label": ["negative", "positive"] * 100}))
    method = ls.AutoLoRA(rank=2)
    settings = SETTINGS | {"epochs": 1}
    run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "run", **settings)
    rows = len(task.split("train"))
    assert run.meta.settings["steps"] == math.ceil(rows / 8)
    search_rows = len(task.split("train", method.search_share))
    assert run.parents[0].meta.settings["steps"] == math.ceil(search_rows / 8) < math.ceil(rows / 8)


def test_trainings_by_steps_keep_their_settings():
    settings = Settings(steps=6, lr=1e-3, head_lr=1e-3)
    assert "epochs" not in settings.to_dict()
    assert settings.resolve(21) is settings


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": 3}, "pass steps or epochs, got both"),
        ({"epochs": None}, "pass steps or epochs, such as steps=300, got neither"),
        ({"epochs": 0}, "epochs must be a number > 0, got 0"),
        ({"epochs": math.inf}, "epochs must be a number > 0, got inf"),
        (
            {"epochs": None, "steps": 3, "eval_every": "epoch"},
            "eval_every must be an integer >= 0 without epochs, got 'epoch'",
        ),
        ({"keep_checkpoints": (6,)}, "keep_checkpoints must be steps from 1 to 5, got (6,)"),
    ],
)
def test_invalid_length_raises_one_line(bert, task, tmp_path, change, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ls.train(models.load(bert, task=task), task, "lora", out=tmp_path / "run", **SETTINGS | change)
    assert not (tmp_path / "run").exists()


def test_sweep_and_command_take_epochs(bert, task, tmp_path, capsys):
    table = {"task": task, "method": "lora", "settings": {"epochs": [1, 2]}}
    assert [job.settings["epochs"] for job in grid.read(table | {"seeds": 1}).jobs()] == [1, 2]
    with pytest.raises(ValueError, match=r"^pass steps or epochs, got both$"):
        grid.read(table | {"settings": {"epochs": 1, "steps": 3}})
    path = tmp_path / "rows.csv"
    task.table.drop(columns="draw").to_csv(path, index=False)
    words = ["train", "lora", "--model", str(bert), "--task", str(path), "--no-progress", "-o", str(tmp_path / "run")]
    assert main([*words, "--epochs", "1", "--batch-size", "8", "--eval-every", "epoch"]) == 0
    assert ls.load(tmp_path / "run").meta.settings["steps"] == 3
    capsys.readouterr()
