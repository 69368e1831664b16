"""Contract of every registered method, with one row of ``method_rows`` each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.method_rows import ROWS, MethodRow
from forks import check_that_a_killed_run_goes_on
from killing import SETTINGS
from tiny import inputs
from tolerance import TEXT, TINY, rounding

import lorascope as ls
from lorascope.adapters.delta import attached_deltas, fold
from lorascope.inputs import models
from lorascope.methods import METHODS
from lorascope.methods.base import config, from_config
from lorascope.updates import from_factors

EVERY = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


@pytest.fixture(scope="module")
def trained(bert, task, tmp_path_factory):
    """Return a function that trains the method of a row once, and returns its run and its model."""
    known: dict[str, Any] = {}

    def once(row: MethodRow) -> Any:
        name = row.method.name
        if name not in known:
            model = models.load(bert, task=task)
            out = tmp_path_factory.mktemp(name) / "run"
            known[name] = ls.train(model, task, row.method, out=out, **SETTINGS), model
        return known[name]

    return once


def test_every_method_has_a_row() -> None:
    assert ROWS.keys() == {name for name in METHODS if METHODS[name].__module__.startswith("lorascope.")}


@EVERY
def test_method_survives_json(row: MethodRow) -> None:
    assert from_config(json.loads(json.dumps(config(row.method)))) == row.method
    assert row.method.label().startswith(type(row.method).__name__)


@EVERY
def test_training_starts_where_the_row_says(row: MethodRow, bert, task) -> None:
    model = models.load(bert, task=task)
    before = logits(model)
    row.method.attach(model)
    change = float((logits(model) - before).abs().max() / before.abs().max())
    assert (change <= rounding(terms=TINY, growth=TEXT)) == row.starts_at_zero


@EVERY
def test_killed_run_resumes_bitwise(row: MethodRow, forks, tmp_path: Path) -> None:
    check_that_a_killed_run_goes_on(forks, row.method, tmp_path, at=row.killed_at, after=row.killed_after)


@EVERY
def test_restored_run_has_the_logits_of_the_trained_model(row: MethodRow, trained, bert, task) -> None:
    run, model = trained(row)
    again = models.load(bert, task=task)
    ls.load(run.path).restore(again)
    assert torch.equal(logits(again), logits(model))


@EVERY
def test_stored_updates_equal_the_models(row: MethodRow, trained) -> None:
    run, model = trained(row)
    stored, live = run.updates(), attached_deltas(model)
    assert stored.keys() == live.keys()
    for module, update in stored.items():
        again = from_factors(update.to_factors(), update.scale, update.exact, update.form)
        assert (again.dense() == update.dense()).all()
        if update.whole:
            assert (update.dense() == live[module].update().dense()).all()


@EVERY
def test_trained_updates_fold_exactly(row: MethodRow, trained, bert, task) -> None:
    run, _ = trained(row)
    model = models.load(bert, task=task)
    run.restore(model)
    before = logits(model.double())
    if not row.folds:
        with pytest.raises(ValueError, match="depends on the input"):
            fold(model)
        return
    fold(model)
    assert not attached_deltas(model)
    change = float((logits(model) - before).abs().max() / before.abs().max())
    assert change <= rounding(torch.float64, terms=TINY, growth=TEXT)


@EVERY
def test_export_has_equal_logits_or_is_refused_in_one_line(
    row: MethodRow, trained, tmp_path: Path, monkeypatch
) -> None:
    run, model = trained(row)
    if row.refused:
        with pytest.raises(ValueError, match=row.refused) as raised:
            ls.export.to_peft(run, tmp_path / "adapter")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "adapter").exists()
        return
    out = ls.export.to_peft(run, tmp_path / "adapter")
    theirs = load_by_the_card(out, monkeypatch)
    expected, found = logits(model.double()), logits(theirs.double())
    model.float()
    assert float((found - expected).abs().max() / expected.abs().max()) <= rounding(terms=TINY, growth=TEXT)


def load_by_the_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load the adapter by the code in its README."""
    snippet = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippet
    monkeypatch.chdir(out.parent)
    scope: dict[str, Any] = {}
    exec(snippet[1], scope)
    return scope["model"].eval()


@EVERY
def test_run_passes_through_every_door(row: MethodRow, trained, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained(row)
    again = ls.load(run.path)
    assert again.meta == run.meta
    assert len(again.summary())
    assert run.id in repr(again)
    assert isinstance(ls.diagnose(again), list)
