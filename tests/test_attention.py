"""Tests of ``train(attention=)``: the implementation of attention that a model uses."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainers import without_dropout

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments import grid
from lorascope.inputs import models
from lorascope.inputs.computation import set_attention
from lorascope.methods import AutoLoRA, LoRA
from lorascope.training.settings import Settings

SETTINGS = {"steps": 4, "batch_size": 8, "eval_size": 32, "test_size": 32, "progress": False, "device": "cpu"}


def losses(run):
    """Return the training losses of a run, and its test loss."""
    table = run.table
    return [*table[table["quantity"] == "loss"]["value"], run.meta.test.loss]


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_eager_and_sdpa_have_equal_losses(architecture, request, task, tmp_path):
    folder = request.getfixturevalue(architecture)
    runs = {}
    for attention in ("eager", "sdpa"):
        model = without_dropout(models.load(folder, task=task))
        runs[attention] = ls.train(model, task, LoRA(rank=2, lr=1e-2), attention=attention, root=tmp_path, **SETTINGS)
        assert model.config._attn_implementation == attention
        assert runs[attention].meta.settings["attention"] == attention
    assert losses(runs["eager"]) == pytest.approx(losses(runs["sdpa"]), rel=1e-5)
    assert runs["eager"].id != runs["sdpa"].id


def test_the_attention_of_the_setting_is_called(fresh_bert, task, tmp_path):
    """Without any kernel that sdpa could use, only eager attention runs."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        run = ls.train(fresh_bert, task, "lora", attention="eager", root=tmp_path, **SETTINGS)
        assert run.meta.status == "done"
        with pytest.raises(RuntimeError, match="No viable backend"):
            ls.train(models.load(fresh_bert.name_or_path, task=task), task, "lora", root=tmp_path, **SETTINGS)


def test_a_finished_run_returns_a_model_with_its_attention(bert, task, tmp_path):
    options = {"attention": "eager", "root": tmp_path, **SETTINGS}
    first = ls.train(bert, task, "lora", **options)
    model = models.load(bert, task=task)
    assert ls.train(model, task, "lora", **options).id == first.id
    assert model.config._attn_implementation == "eager"


def test_a_fork_has_the_attention_of_its_trunk(bert, task, tmp_path):
    trunk = ls.train(bert, task, "lora", attention="eager", keep_checkpoints=[2], root=tmp_path, **SETTINGS)
    model = models.load(bert, task=task)
    fork = ls.fork(trunk, step=2, model=model, task=task, progress=False)
    assert model.config._attn_implementation == "eager"
    assert losses(fork) == losses(trunk)


def test_the_exact_hypergradient_of_autolora_runs_with_eager_attention(bert, task, tmp_path):
    method = AutoLoRA(rank=2, hypergradient="exact")
    run = ls.train(bert, task, method, attention="eager", root=tmp_path, **SETTINGS)
    assert run.meta.status == "done"


def test_the_default_is_not_part_of_the_identity():
    assert "attention" not in Settings(steps=1, lr=1.0, head_lr=1.0).to_dict()


def test_an_unknown_attention_is_one_line(tmp_path, bert, task):
    allowed = "attention must be one of 'eager', 'sdpa', 'flash_attention_2' or None, got 'flash'"
    with pytest.raises(ValueError, match=f"^{re.escape(allowed)}$"):
        ls.train(bert, task, "lora", attention="flash", root=tmp_path, **SETTINGS)
    table = {"task": task, "method": "lora", "settings": {"steps": 1, "attention": ["eager", "flash"]}}
    with pytest.raises(ValueError, match=re.escape(allowed)):
        grid.read(table)


def test_an_attention_that_a_model_lacks_is_one_line(fresh_bert):
    model = tiny("deberta-v2")
    with pytest.raises(ValueError, match=r"^cannot set attention 'sdpa': DebertaV2.* has its own implementation$"):
        set_attention(model, "sdpa", "fp32")
    with pytest.raises(ValueError, match=r"^cannot set the attention of Linear: it is not a model of transformers$"):
        set_attention(torch.nn.Linear(2, 2), "sdpa", "fp32")
    with pytest.raises(ValueError, match=r"^attention 'flash_attention_2' requires precision='bf16', got 'fp32'$"):
        set_attention(fresh_bert, "flash_attention_2", "fp32")


def test_flash_attention_without_its_package_is_one_line(fresh_bert, monkeypatch):
    """Transformers would fetch a kernel from the Hugging Face Hub instead, and run its code."""
    monkeypatch.setattr("lorascope.inputs.computation.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match=r"^attention .flash_attention_2. requires flash-attn: "):
        set_attention(fresh_bert, "flash_attention_2", "bf16")


def test_the_command_line_sets_the_attention(bert, task, tmp_path):
    rows = tmp_path / "rows.csv"
    task.table.to_csv(rows, index=False)
    words = ["--task", str(rows), "--model", bert, "--steps", "1", "--no-progress", "--eval-size", "8"]
    assert main(["train", "lora", *words, "--attention", "eager", "-o", str(tmp_path / "run")]) == 0
    assert ls.load(tmp_path / "run").meta.settings["attention"] == "eager"
