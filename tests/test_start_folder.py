"""Tests of trainings that start from the LoRA folder of PEFT, against PEFT's own training."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from tiny import tiny
from trainers import without_dropout

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments import grid
from lorascope.inputs import models
from lorascope.inputs.classifier_head import draw_new_weights
from lorascope.methods import LISA, AdaLoRA, AutoLoRA, DoRA, LoRA

PLAIN = {"steps": 5, "batch_size": 8, "warmup": 0, "schedule": "constant", "clip": None, "progress": False}
SETTINGS = PLAIN | {"device": "cpu", "eval_size": 32, "test_size": 32}


def write_folder(path, model_folder, task, config):
    """Write an adapter of PEFT with random factors, and return its folder."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        adapted = get_peft_model(models.load(model_folder, task=task), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        adapted.save_pretrained(path)
    return path


@pytest.fixture
def folder(bert, task, tmp_path):
    """Folder of a LoRA of PEFT with rank 2 and scale 4, on query and value of the tiny BERT."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "value"])
    return write_folder(tmp_path / "peft", bert, task, config)


@pytest.mark.parametrize(
    ("architecture", "config", "method"),
    [
        ("bert", {"target_modules": ["query", "value"]}, {"targets": ("q", "v")}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"targets": "qkv"}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, {"targets": (r".*(q_proj|embed_tokens)")}),
    ],
)
def test_losses_equal_those_of_peft_with_the_same_factors(architecture, config, method, request, task, tmp_path):
    model_folder = request.getfixturevalue(architecture)
    source = write_folder(tmp_path / "peft", model_folder, task, LoraConfig(r=2, lora_alpha=8, **config))
    batches = []

    @dataclass(kw_only=True)
    class StoresBatches(LoRA):
        def before_step(self, step):
            batches.append({key: value.clone() for key, value in step.batch.items()})

    StoresBatches.name = "lora"
    model = without_dropout(models.load(model_folder, task=task))
    reference = without_dropout(models.load(model_folder, task=task))
    own = StoresBatches(rank=2, alpha=8, lr=1e-2, head_lr=1e-2, **method)
    run = ls.train(model, task, own, start=source, out=tmp_path / "run", **SETTINGS)

    draw_new_weights(reference, seed=0)
    adapted = PeftModel.from_pretrained(reference, source, is_trainable=True)
    if architecture == "bert":
        reference.classifier.requires_grad_(True)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    adapted.train()
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    table = run.table
    assert table[table["quantity"] == "loss"]["value"].to_list() == pytest.approx(losses, rel=1e-5)


def test_the_run_stores_its_start_and_begins_at_its_updates(folder, bert, task, tmp_path):
    """At a rate of 1e-30, float32 weights keep their values: the last state is the start."""
    still = SETTINGS | {"lr": 1e-30, "head_lr": 1e-30, "steps": 1, "root": tmp_path}
    run = ls.train(bert, task, LoRA(rank=2, alpha=8), start=folder, **still)
    source = ls.load(folder)
    assert (run.meta.start.run, run.meta.start.head) == (source.id, False)
    assert run.meta.facts["starts_at_zero"] is False
    assert run.id != ls.train(bert, task, LoRA(rank=2, alpha=8), **still).id
    updates = source.updates()
    assert updates.keys() == run.updates().keys()
    for module, update in run.updates().items():
        np.testing.assert_array_equal(update.dense(), updates[module].dense())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(rank=4), r"its rank of bert\.\S+query is 2, not 4"),
        (LoRA(rank=2, alpha=16), r"its scale of bert\.\S+query is 4, not 8: set alpha"),
        (LoRA(rank=2, alpha=8, targets=("q", "k", "v")), r"it does not adapt bert\.\S+key"),
        (LoRA(rank=2, alpha=8, targets="q"), r"it also adapts bert\.\S+value"),
        (AdaLoRA(), "its method is lora, not adalora"),
        (DoRA(), "its method is lora, not dora"),
        (LISA(), "cannot start LISA from an adapter: fold it into the model first"),
        (AutoLoRA(), "cannot start AutoLoRA from an adapter: it trains in phases"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(method, message, folder, bert, task, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        ls.train(bert, task, method, start=folder, root=tmp_path, **SETTINGS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "its method is dora, not lora"),
        ({"bias": "lora_only"}, "it has trained biases"),
        ({"lora_bias": True}, "it has trained biases"),
        ({"init_lora_weights": "pissa"}, "its factors are relative to other base weights"),
    ],
)
def test_a_variant_of_lora_is_rejected(options, message, bert, task, tmp_path):
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "value"], **options)
    source = write_folder(tmp_path / "peft", bert, task, config)
    with pytest.raises(ValueError, match=message) as raised:
        ls.train(bert, task, LoRA(rank=2, alpha=8), start=source, root=tmp_path, **SETTINGS)
    assert "\n" not in str(raised.value)


def test_another_method_of_peft_and_a_head_are_rejected(folder, bert, task, tmp_path):
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=10, lora_alpha=8, target_modules=["query", "value"])
    other = write_folder(tmp_path / "adalora", bert, task, config)
    with pytest.raises(ValueError, match="its method is adalora, not lora"):
        ls.train(bert, task, LoRA(rank=2, alpha=8), start=other, root=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=re.escape("start_head requires a run of ls.train as start, got")):
        ls.train(bert, task, LoRA(rank=2, alpha=8), start=folder, start_head=True, root=tmp_path, **SETTINGS)


def test_an_adapter_without_a_configuration_of_peft_is_rejected(folder, bert, task, tmp_path):
    source = ls.export.convert(ls.load(folder), tmp_path / "converted.safetensors", "kohya", component="text_encoder")
    with pytest.raises(ValueError, match="it is not a folder of PEFT"):
        ls.train(bert, task, LoRA(rank=2, alpha=8), start=source, root=tmp_path, **SETTINGS)


def test_a_folder_of_another_width_is_one_line(folder, bert, task, tmp_path):
    wide = str(tmp_path / "wide")
    tiny("bert", "base", hidden_size=64).save_pretrained(wide)
    models.tokenizer(models.load(bert)).save_pretrained(wide)
    with pytest.raises(ValueError, match=r"its A of bert\.\S+query has shape \(2, 32\), not \(2, 64\)"):
        ls.train(wide, task, LoRA(rank=2, alpha=8), start=folder, root=tmp_path, **SETTINGS)


def test_a_sweep_and_the_command_line_start_from_a_folder(folder, bert, task, tmp_path):
    table = {"task": task, "method": "lora", "settings": {"steps": 1, "start": str(folder)}}
    assert grid.read(table).settings[0]["start"] == str(folder)
    rows = tmp_path / "rows.csv"
    task.table.to_csv(rows, index=False)
    words = ["--task", str(rows), "--model", bert, "--steps", "1", "--no-progress", "--eval-size", "8"]
    words += ["--rank", "2", "--alpha", "8", "--start", str(folder), "-o", str(tmp_path / "run")]
    assert main(["train", "lora", *words]) == 0
    assert ls.load(tmp_path / "run").meta.start.run == ls.load(folder).id
    assert json.loads((tmp_path / "run/run.json").read_text())["start"]["head"] is False
