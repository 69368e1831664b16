"""Tests of the settings of loss and optimizer that PyTorch has too, against plain loops on the same batches."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
from tiny import tiny
from torch.nn import functional as F
from trainers import without_dropout

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments import grid
from lorascope.inputs import models, tasks
from lorascope.inputs.classifier_head import draw_new_weights
from lorascope.methods import Adapprox, Full
from lorascope.training.settings import Settings

unchecked = pytest.mark.skipif(hasattr(ls.record, "__wrapped__"), reason="types are checked at every call")
STEPS = 5
PLAIN = {"steps": STEPS, "batch_size": 8, "warmup": 0, "schedule": "constant", "clip": None, "progress": False}
SETTINGS = PLAIN | {"device": "cpu", "eval_size": 64, "test_size": 64}
ADAM = {"betas": (0.8, 0.99), "eps": 1e-3}


def train_and_compare(model, task, loss_of, tmp_path, **settings):
    """Train a model, and assert that a plain loop on the same batches gives its losses and weights; return the run."""
    without_dropout(model)
    reference = copy.deepcopy(model)
    batches = []

    @dataclass(kw_only=True)
    class StoresBatches(Full):
        def before_step(self, step):
            batches.append({key: value.clone() for key, value in step.batch.items()})

    run = ls.train(model, task, StoresBatches(lr=1e-3, head_lr=1e-3), out=tmp_path / "run", **SETTINGS, **settings)
    draw_new_weights(reference, seed=0)
    adam = {name: settings[name] for name in ADAM if name in settings}
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0, **adam)
    reference.train()
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(reference, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    table = run.table
    assert table[table["quantity"] == "loss"]["value"].to_list() == pytest.approx(losses, rel=1e-6)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)
    return run


def smooth_classes(model, batch):
    return F.cross_entropy(model(**batch).logits, batch["labels"], label_smoothing=0.1)


def smooth_tokens(model, batch):
    logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def test_label_smoothing_of_classes_equals_a_plain_loop(fresh_bert, task, tmp_path):
    run = train_and_compare(fresh_bert, task, smooth_classes, tmp_path, label_smoothing=0.1)
    assert run.meta.settings["label_smoothing"] == 0.1


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_label_smoothing_of_tokens_equals_a_plain_loop(architecture, request, task, tmp_path):
    model = models.load(request.getfixturevalue(architecture), task=task)
    train_and_compare(model, task, smooth_tokens, tmp_path, label_smoothing=0.1)


def test_label_smoothing_of_an_encoder_decoder_equals_a_plain_loop(gpt2, task, tmp_path):
    folder = tmp_path / "t5"
    tiny("t5").save_pretrained(folder)
    models.tokenizer(models.load(gpt2)).save_pretrained(folder)

    def smooth(model, batch):
        return F.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)

    train_and_compare(models.load(folder, task=task), task, smooth, tmp_path, label_smoothing=0.1)


def test_betas_and_eps_equal_a_plain_loop(fresh_bert, task, tmp_path):
    run = train_and_compare(fresh_bert, task, lambda model, batch: model(**batch).loss, tmp_path, **ADAM)
    assert run.meta.settings["betas"] == [0.8, 0.99]
    assert run.meta.settings["eps"] == 1e-3


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_evaluation_is_not_smoothed(architecture, request, task, tmp_path):
    """At a rate of 1e-30 the weights stay, so that both evaluations are of the same model."""
    folder = request.getfixturevalue(architecture)
    still = SETTINGS | {"lr": 1e-30, "head_lr": 1e-30, "root": tmp_path}
    plain = ls.train(folder, task, "lora", **still)
    smooth = ls.train(folder, task, "lora", label_smoothing=0.5, **still)
    assert smooth.id != plain.id
    assert smooth.meta.test.loss == plain.meta.test.loss
    losses = [run.table[run.table["quantity"] == "loss"]["value"].to_list() for run in (plain, smooth)]
    assert losses[0] != losses[1]


def test_accumulation_and_short_batches_give_the_same_smoothed_losses(gpt2, task, tmp_path):
    losses = []
    for accumulate in (1, 4):
        model = without_dropout(models.load(gpt2, task=task))
        settings = {name: value for name, value in SETTINGS.items() if name != "steps"} | {"epochs": 0.2}
        options = settings | {"label_smoothing": 0.1, "accumulate": accumulate, "out": tmp_path / str(accumulate)}
        run = ls.train(model, task, Full(lr=1e-3), **options)
        losses.append(run.table[run.table["quantity"] == "loss"]["value"].to_list())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_defaults_do_not_change_the_identity_of_a_run():
    settings = Settings(steps=1, lr=1.0, head_lr=1.0)
    stored = settings.to_dict()
    assert not {"label_smoothing", "betas", "eps"} & stored.keys()
    assert Settings(steps=1, lr=1.0, head_lr=1.0, label_smoothing=0, betas=[0.9, 0.999], eps=1e-8).to_dict() == stored
    changed = Settings(steps=1, lr=1.0, head_lr=1.0, label_smoothing=0.1, **ADAM)
    assert Settings.read(changed.to_dict()).to_dict() == changed.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.1}, "label_smoothing must be a number from 0 to 1, got 1.1"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in [0, 1), got (0.9, 1.0)"),
        ({"betas": (0.9,)}, "betas must be two numbers in [0, 1), got (0.9,)"),
        ({"eps": 0}, "eps must be a finite number > 0, got 0"),
        pytest.param({"eps": "1e-8"}, "eps must be a finite number > 0, got '1e-8'", marks=unchecked),
        pytest.param({"betas": 0.9}, "betas must be two numbers in [0, 1), got 0.9", marks=unchecked),
        pytest.param(
            {"label_smoothing": "a"}, "label_smoothing must be a number from 0 to 1, got 'a'", marks=unchecked
        ),
    ],
)
def test_invalid_values_raise_one_line(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings(steps=1, lr=1.0, head_lr=1.0, **change)


def test_label_smoothing_requires_classes_or_tokens(bert, tmp_path):
    rows = pd.DataFrame({"text": [f"{number} film" for number in range(60)], "label": [0.5, 1.0] * 30})
    ratings = tasks.from_frame(rows, "ratings")
    expected = "^label_smoothing must be 0 for ratings, whose labels are numbers, got 0.1$"
    with pytest.raises(ValueError, match=expected):
        ls.train(bert, ratings, "lora", label_smoothing=0.1, root=tmp_path, **SETTINGS)
    table = {"model": bert, "task": ratings, "method": "lora", "settings": {"steps": 1, "label_smoothing": 0.1}}
    with pytest.raises(ValueError, match=expected):
        grid.read(table)


@pytest.mark.parametrize("method", [Adapprox(), Full(optimizer_name="came"), Full(optimizer_name="adafactor")])
def test_betas_require_adamw(method, bert, task, tmp_path):
    with pytest.raises(ValueError, match=r"^cannot set betas or eps of \w+: its optimizer is \w+, not AdamW$"):
        ls.train(bert, task, method, betas=(0.8, 0.99), root=tmp_path, **SETTINGS)


def test_a_sweep_reads_them_as_values_and_as_lists_of_values(task):
    table = {"task": task, "method": "lora", "settings": {"steps": 1, "betas": [0.9, 0.98], "eps": [1e-8, 1e-6]}}
    settings = grid.read(table).settings
    assert [(setting["betas"], setting["eps"]) for setting in settings] == [([0.9, 0.98], 1e-8), ([0.9, 0.98], 1e-6)]


def test_the_command_line_sets_them_and_leaves_those_of_a_method(bert, task, tmp_path):
    rows = tmp_path / "rows.csv"
    task.table.to_csv(rows, index=False)
    common = ["--task", str(rows), "--model", bert, "--steps", "1", "--no-progress", "--eval-size", "8"]
    words = ["--betas", "0.8", "0.98", "--eps", "1e-6", "--label-smoothing", "0.1"]
    assert main(["train", "lora", *common, *words, "-o", str(tmp_path / "lora")]) == 0
    settings = ls.load(tmp_path / "lora").meta.settings
    assert (settings["betas"], settings["eps"], settings["label_smoothing"]) == ([0.8, 0.98], 1e-6, 0.1)
    assert main(["train", "adapprox", *common, "--eps", "1e-6", "-o", str(tmp_path / "adapprox")]) == 0
    run = ls.load(tmp_path / "adapprox")
    assert run.meta.method["eps"] == 1e-6
    assert "eps" not in run.meta.settings
