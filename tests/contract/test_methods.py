"""Contract of every registered method, on its ``example``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import EXAMPLES, variants
from forks import check_that_a_killed_run_goes_on
from tiny import inputs
from tolerance import TEXT, TINY, rounding

import lorascope as ls
from lorascope.adapters.delta import attached_deltas, fold
from lorascope.inputs import models
from lorascope.methods.field_checks import literal_fields
from lorascope.methods.method import Method, config, from_config
from lorascope.updates import from_factors

EVERY = pytest.mark.parametrize("method", EXAMPLES.values(), ids=EXAMPLES)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


@pytest.fixture
def trained(method: Method, train_once) -> tuple[ls.Run, Any]:
    """Return the run and the model of a method, trained once."""
    return train_once(method.name, method)


@EVERY
def test_method_survives_json(method: Method) -> None:
    for words, variant in [(type(method).__name__, method), *variants(method)]:
        assert words in variant.label()
        assert from_config(json.loads(json.dumps(config(variant)))) == variant


@EVERY
def test_unknown_value_of_a_literal_field_raises_one_line(method: Method) -> None:
    """The value is set as the command line sets it, without type checks."""
    for name, values in literal_fields(type(method)).items():
        wrong = replace(method)
        setattr(wrong, name, "unknown")
        with pytest.raises(ValueError, match=f"^{name} must be one of '{values[0]}', .*, got 'unknown'$"):
            wrong.__post_init__()


@EVERY
def test_training_starts_where_the_method_says(method: Method, bert, task) -> None:
    model = models.load(bert, task=task)
    before = logits(model)
    method.attach(model)
    change = float((logits(model) - before).abs().max() / before.abs().max())
    assert (change <= rounding(terms=TINY, growth=TEXT)) == method.describe()["starts_at_zero"]


@pytest.mark.slow
@EVERY
def test_killed_run_resumes_bitwise(method: Method, forks, tmp_path: Path) -> None:
    check_that_a_killed_run_goes_on(forks, method, tmp_path)


@EVERY
def test_restored_run_has_the_logits_of_the_trained_model(trained, bert, task) -> None:
    run, model = trained
    again = models.load(bert, task=task)
    ls.load(run.path).restore(again)
    assert torch.equal(logits(again), logits(model))


def check_updates(run: ls.Run, state: str, model: Any) -> None:
    """Check that the updates and ranks that a run stored are those of a model, bit for bit."""
    stored, live = run.updates(state=state), attached_deltas(model)
    assert stored.keys() == live.keys()
    assert run.ranks(state) == {module: delta.rank for module, delta in live.items()}
    for module, update in stored.items():
        of_model = live[module].update()
        assert update.scale == of_model.scale
        for name, factor in update.to_factors().items():
            assert np.array_equal(factor, of_model.to_factors()[name]), (module, name)
        again = from_factors(update.to_factors(), update.scale, update.exact, update.form)
        assert (again.dense() == update.dense()).all()


@EVERY
def test_every_state_of_every_phase_is_restored(trained, bert, task) -> None:
    run, model = trained
    check_updates(run, "last", model)
    for phase in (*run.parents, run):
        assert phase.meta.states.keys() == {"last", "best"}
        for state in phase.meta.states:
            again = models.load(bert, task=task)
            phase.restore(again, state=state)
            check_updates(phase, state, again)
            for name, tensor in phase.tensors(state).items():
                if "/" not in name:  # state of the method
                    assert np.array_equal(again.state_dict(keep_vars=True)[name].detach(), tensor), name


@pytest.mark.parametrize("name", ["adalora", "alora"])
def test_examples_include_modules_of_rank_zero(name: str, train_once) -> None:
    run, _ = train_once(name, EXAMPLES[name])
    assert 0 in run.ranks().values()


@EVERY
def test_trained_updates_fold_exactly(trained, bert, task) -> None:
    run, _ = trained
    for phase in (*run.parents, run):
        model = models.load(bert, task=task)
        phase.restore(model)
        before = logits(model.double())
        if not all(delta.linear for delta in attached_deltas(model).values()):
            with pytest.raises(ValueError, match="depends on the input"):
                fold(model)
            continue
        fold(model)
        assert not attached_deltas(model)
        change = float((logits(model) - before).abs().max() / before.abs().max())
        assert change <= rounding(torch.float64, terms=TINY, growth=TEXT)


@EVERY
def test_run_passes_through_every_door(trained) -> None:
    run, _ = trained
    again = ls.load(run.path)
    assert again.meta == run.meta
    assert len(again.summary())
    assert run.id in repr(again)
    assert isinstance(ls.diagnose(again), list)
