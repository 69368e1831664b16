"""Runs whose saved states were removed."""

from __future__ import annotations

import pytest

from lorascope import observe
from lorascope.inputs.models import load
from lorascope.methods import Full, NeFT
from lorascope.runs.writer import remove_states
from lorascope.training import loop
from lorascope.training.output_folder import StateRemoved


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
