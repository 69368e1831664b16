"""Tests of what probes share: the registered arms, word counts, gains of adapters, and runs without saved states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lorascope import observe
from lorascope.inputs.models import load
from lorascope.methods import Full, NeFT
from lorascope.methods.lora import LoRADelta
from lorascope.papers.lora import tfidf_correct
from lorascope.runs.writer import remove_states
from lorascope.training import loop
from lorascope.training.output_folder import StateRemoved


def test_embedding_adapter_has_a_larger_gain_than_a_linear_adapter():
    """At minilm's width the gains are sqrt(384) and 1 / sqrt(3); full fine-tuning has no such factor of 34."""
    torch.manual_seed(0)
    gains = []
    for host, trained in ((nn.Embedding(3000, 384), "A"), (nn.Linear(384, 384), "B")):
        delta = LoRADelta(host, 16)
        factor = getattr(delta, trained)
        assert not factor.any()
        nn.init.normal_(factor)
        gains.append((delta.weight().norm() / factor.norm()).item())
    assert gains == pytest.approx([384**0.5, 3**-0.5], rel=0.03)
    assert np.log10(gains[0] / gains[1]) == pytest.approx(1.53, abs=0.02)


def test_tfidf_baseline_classifies_the_toy_task(task):
    correct = tfidf_correct(task)
    assert len(correct) == len(task.split("test"))
    assert correct.mean() > 0.9


@pytest.mark.parametrize("method", [Full(), NeFT(num_neurons=4, tune_steps=2)], ids=lambda method: method.name)
def test_train_on_a_run_with_removed_state_names_overwrite(method, bert, task, tmp_path):
    """The same call cannot restore the removed parameters; with overwrite=True it trains again."""
    settings = {"steps": 3, "batch_size": 4, "eval_every": 1, "eval_size": 16, "test_size": 16}
    settings |= {"observe": [observe.norms(every=1)], "progress": False, "root": tmp_path, "device": "cpu"}
    run = loop.train(load(bert, task=task), task, method, **settings)
    assert run.restorable
    remove_states(run)
    line = f"^cannot restore run {run.id}: its state was removed to save disk space. .+ overwrite=True$"
    with pytest.raises(StateRemoved, match=line) as caught:
        loop.train(load(bert, task=task), task, method, **settings)
    assert caught.value.run.id == run.id
    again = loop.train(load(bert, task=task), task, method, overwrite=True, **settings)
    assert again.id == run.id
    again.restore(load(bert, task=task))
