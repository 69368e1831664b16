"""Tests of ``train(gradient_checkpointing=True)``: fewer stored activations, and the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import EXAMPLES
from tiny import tiny

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments import grid
from lorascope.inputs import models
from lorascope.inputs.computation import enable_checkpointing
from lorascope.methods import AutoLoRA, LoRA
from lorascope.observe import neurons, norms
from lorascope.training.settings import Settings

SETTINGS = {"steps": 4, "batch_size": 8, "eval_size": 32, "test_size": 32, "progress": False, "device": "cpu"}
TIMES = ("seconds", "factor_seconds")


def assert_equal_runs(run, other):
    """Assert that two runs have the same trained weights and records, bit by bit, except for times."""
    tensors, expected = run.tensors(), other.tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    columns = ["step", "quantity", "module", "index", "value"]
    tables = []
    for table in (run.table, other.table):
        tables.append(table[~table["quantity"].isin(TIMES)][columns].reset_index(drop=True))
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"autolora"}))
def test_a_method_trains_the_same_weights(name, bert, task, tmp_path):
    """BERT has dropout, so that the recomputed passes need the random numbers of the first ones."""
    options = SETTINGS | {"root": tmp_path, "observe": [norms(), neurons(every=2)]}
    plain = ls.train(bert, task, EXAMPLES[name], **options)
    checkpointed = ls.train(bert, task, EXAMPLES[name], gradient_checkpointing=True, **options)
    assert_equal_runs(checkpointed, plain)
    assert checkpointed.id != plain.id


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_decoder_trains_the_same_weights(architecture, request, task, tmp_path):
    folder = request.getfixturevalue(architecture)
    options = SETTINGS | {"root": tmp_path, "accumulate": 2, "label_smoothing": 0.1}
    plain = ls.train(folder, task, LoRA(rank=2), **options)
    assert_equal_runs(ls.train(folder, task, LoRA(rank=2), gradient_checkpointing=True, **options), plain)


def test_each_block_runs_twice_per_step_of_training_and_once_per_evaluation(fresh_bert, task, tmp_path):
    calls = {True: 0, False: 0}

    def count(module, inputs):
        calls[module.training] += 1

    fresh_bert.bert.encoder.layer[0].attention.self.query.register_forward_pre_hook(count)
    options = SETTINGS | {"eval_every": 0, "root": tmp_path}
    ls.train(fresh_bert, task, LoRA(rank=2), gradient_checkpointing=True, **options)
    assert calls == {True: 2 * SETTINGS["steps"], False: 2}


def test_the_search_of_autolora_is_rejected(bert, task, tmp_path):
    expected = "^cannot checkpoint the search of AutoLoRA: it differentiates at other weights; .*"
    with pytest.raises(ValueError, match=expected) as raised:
        ls.train(bert, task, AutoLoRA(rank=2), gradient_checkpointing=True, root=tmp_path, **SETTINGS)
    assert "\n" not in str(raised.value)
    assert ls.train(bert, task, AutoLoRA(rank=2), root=tmp_path, **SETTINGS).meta.status == "done"


def test_a_fork_recomputes_as_its_trunk(bert, task, tmp_path):
    options = {"gradient_checkpointing": True, "keep_checkpoints": [2], "root": tmp_path}
    trunk = ls.train(bert, task, LoRA(rank=2), **options, **SETTINGS)
    model = models.load(bert, task=task)
    assert_equal_runs(ls.fork(trunk, step=2, model=model, task=task, progress=False), trunk)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.skipif(hasattr(ls.record, "__wrapped__"), reason="types are checked at every call")
def test_an_invalid_value_is_one_line():
    with pytest.raises(ValueError, match=r"^gradient_checkpointing must be True or False, got 'yes'$"):
        Settings(steps=1, lr=1.0, head_lr=1.0, gradient_checkpointing="yes")


def test_a_model_that_cannot_be_checkpointed_is_one_line():
    with pytest.raises(ValueError, match=r"^cannot checkpoint the gradients of Linear: "):
        enable_checkpointing(torch.nn.Linear(2, 2))
    model = tiny("bert")
    enable_checkpointing(model)
    assert model.is_gradient_checkpointing


def test_the_default_is_not_part_of_the_identity():
    assert "gradient_checkpointing" not in Settings(steps=1, lr=1.0, head_lr=1.0).to_dict()


def test_sweeps_and_the_command_line_set_it(bert, task, tmp_path):
    table = {"task": task, "method": "lora", "settings": {"steps": 1, "gradient_checkpointing": [True, False]}}
    assert [settings["gradient_checkpointing"] for settings in grid.read(table).settings] == [True, False]
    rows = tmp_path / "rows.csv"
    task.table.to_csv(rows, index=False)
    words = ["--task", str(rows), "--model", bert, "--steps", "1", "--no-progress", "--eval-size", "8"]
    assert main(["train", "lora", *words, "--gradient-checkpointing", "-o", str(tmp_path / "run")]) == 0
    assert ls.load(tmp_path / "run").meta.settings["gradient_checkpointing"] is True
