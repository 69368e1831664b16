"""Tests of the evaluation before the first step: it is never the best and does not change the training."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import TEXT, TINY, near

import lorascope as ls
from lorascope import observe
from lorascope.adapters import delta
from lorascope.inputs import models
from lorascope.methods import LISA, FourierFT, Full, HydraLoRA, LoRA
from lorascope.training.session import Session

FAST = {"steps": 3, "batch_size": 8, "eval_size": 16, "test_size": 16, "progress": False, "device": "cpu"}


class BeforeTraining(observe.Observer):
    """Evaluates the model at step 0 with and without its adapters."""

    def config(self):
        return {"name": "BeforeTraining"}

    def __call__(self, step):
        if step.finished == 0:
            whole = step.held_out()
            bare = copy.deepcopy(step.model)
            delta.detach(bare)
            with torch.no_grad():
                BeforeTraining.losses = [float(m.eval()(**whole.batch).loss) for m in (step.model, bare)]
            step.model.train()
        return ()


@pytest.mark.parametrize("method", [FourierFT(alpha=1000), LoRA()], ids=["away from W_0", "at W_0"])
def test_first_evaluation_is_before_the_first_step(method, fresh_bert, task, tmp_path):
    observers = [BeforeTraining()]
    run = ls.train(fresh_bert, task, method, observe=observers, eval_every=2, out=tmp_path / "run", **FAST)
    found = run.table[run.table["quantity"] == "eval_loss"].set_index("step")["value"]
    assert list(found.index) == sorted({0, *range(2, FAST["steps"] + 1, 2), FAST["steps"]})
    start, base = BeforeTraining.losses
    assert found[0] == near(start, terms=TINY, growth=TEXT)
    assert (abs(start - base) > 1e-4) == isinstance(method, FourierFT)


def test_best_state_is_never_step_zero(fresh_bert, task, tmp_path):
    """The learning rate ruins the model in the first steps."""
    run = ls.train(fresh_bert, task, Full(lr=10.0), eval_every=1, warmup=0, out=tmp_path / "run", **FAST)
    assert run.meta.states["best"].step > 0


def test_eval_every_zero_evaluates_only_after_the_last_step(fresh_bert, task, tmp_path):
    run = ls.train(fresh_bert, task, LoRA(), eval_every=0, out=tmp_path / "run", **FAST)
    assert run.table.query("quantity == 'eval_loss'")["step"].tolist() == [FAST["steps"]]


@pytest.mark.parametrize("method", [HydraLoRA(gates_every=1), LISA(n_active=1)], ids=lambda m: m.name)
def test_first_evaluation_does_not_change_the_training(method, bert, task, tmp_path, monkeypatch):
    """Compared with a session that does not evaluate at step 0."""
    tables, weights = [], []
    whole = Session.evaluate
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(Session, "evaluate", lambda self: whole(self) if self.step.finished else None)
        model = models.load(bert, task=task)
        run = ls.train(model, task, method, eval_every=1, out=tmp_path / name, **FAST)
        table = run.table.astype(str)
        first = (table["step"] == "0") & table["quantity"].str.startswith("eval")
        table = table[(table["quantity"] != "seconds") & ~first]
        tables.append(table.reset_index(drop=True))
        weights.append(model.state_dict())
    assert tables[0].equals(tables[1])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
