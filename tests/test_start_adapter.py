"""Tests of trainings that start from the adapter of another run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lorascope as ls
from lorascope.methods import LISA, AdaLoRA, AutoLoRA, LoRA


@pytest.fixture
def settings(tmp_path):
    """Return settings of a short training with an evaluation before it."""
    return {"steps": 6, "batch_size": 8, "eval_every": 3, "lr": 1e-2, "root": tmp_path, "progress": False}


def evaluations(run):
    """Return the validation losses of a run by step."""
    table = run.table
    return table[table["quantity"] == "eval_loss"].set_index("step")["value"]


def test_a_run_with_the_head_of_its_start_begins_at_its_last_loss(task, settings, bert):
    first = ls.train(bert, task, LoRA(rank=2), **settings)
    second = ls.train(bert, task, LoRA(rank=2), start=first.path, start_head=True, **settings)
    assert evaluations(second)[0] == evaluations(first)[6]
    assert evaluations(second)[0] != evaluations(first)[0]
    assert second.meta.start.run == first.id
    assert second.meta.facts["starts_at_zero"] is False
    assert second.id != ls.train(bert, task, LoRA(rank=2), start=first, **settings).id


def test_without_its_head_only_the_factors_equal_the_start(task, settings, bert):
    """At a rate of 1e-30, float32 weights keep their values and zeros move by 1e-30: the last state is the start."""
    first = ls.train(bert, task, LoRA(rank=2), **settings)
    still = settings | {"lr": 1e-30, "head_lr": 1e-30, "steps": 1}
    fresh = ls.train(bert, task, LoRA(rank=2), **still)
    second = ls.train(bert, task, LoRA(rank=2), start=first, **still)
    tensors, source, new = second.tensors(), first.tensors(), fresh.tensors()
    factors = [name for name in tensors if "classifier" not in name]
    heads = [name for name in tensors if "classifier" in name]
    assert factors
    assert heads
    for name in factors:
        np.testing.assert_array_equal(tensors[name], source[name])
    for name in heads:
        np.testing.assert_allclose(tensors[name], new[name], rtol=0, atol=1e-29)


def test_a_fork_of_a_started_run_continues_it_bit_by_bit(task, settings, bert):
    first = ls.train(bert, task, LoRA(rank=2), **settings)
    second = ls.train(bert, task, LoRA(rank=2), start=first, keep_checkpoints=[3], **settings)
    forked = ls.fork(second, step=3, model=bert, task=task, progress=False)
    assert evaluations(forked)[6] == evaluations(second)[6]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(rank=4), r"its .* has shape \(2, 32\), not \(4, 32\)"),
        (LoRA(rank=2, targets=("q", "k")), "it did not train .*key"),
        (AdaLoRA(), "its method is lora, not adalora"),
        (LISA(), "cannot start LISA from an adapter: fold it into the model first"),
        (AutoLoRA(), "cannot start AutoLoRA from an adapter: it trains in phases"),
    ],
)
def test_a_start_that_does_not_fit_is_one_line(method, message, task, settings, bert):
    first = ls.train(bert, task, LoRA(rank=2), **settings)
    with pytest.raises(ValueError, match=message) as raised:
        ls.train(bert, task, method, start=first, **settings)
    assert "\n" not in str(raised.value)


def test_a_start_on_other_base_weights_is_rejected(task, settings, bert):
    first = ls.train(bert, task, LoRA(rank=2), **settings)
    model = ls.models.load(bert)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.add_(1)
    with pytest.raises(ValueError, match="its base weights differ"):
        ls.train(model, task, LoRA(rank=2), start=first, **settings)


def test_a_start_must_be_a_finished_run(task, settings, bert):
    with pytest.raises(ValueError, match="start_head requires start"):
        ls.train(bert, task, LoRA(rank=2), start_head=True, **settings)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ls.train(bert, task, LoRA(rank=2), start="nowhere", **settings)
