"""Tests of the state that is tested: the best one on the validation split, or the last one."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import lorascope as ls
from lorascope.inputs import models, tasks
from lorascope.training.evaluation import evaluate

METHODS = [
    ls.LoRA(rank=2),
    ls.AdaLoRA(init_rank=4, target_rank=1, initial_steps=1, final_steps=8, mask_every=1),
    ls.HydraLoRA(rank=2),
    ls.Full(),
]
# A rate that makes the last state worse than an earlier one.
SETTINGS = {"steps": 12, "batch_size": 8, "lr": 0.05, "eval_every": 2, "schedule": "constant", "progress": False}


def untested(table: pd.DataFrame) -> pd.DataFrame:
    """Return the records that depend neither on the test nor on the clock."""
    quantities = table["quantity"].astype("str")
    is_kept = ~(quantities.str.startswith("test_") | quantities.str.contains("seconds"))
    return table[is_kept].reset_index(drop=True)


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def trained(request, bert, task, tmp_path):
    """Return a run that tested its best state, the model and a run that tested its last state."""
    runs = []
    for state in ("best", "last"):
        model = models.load(bert, task=task)
        runs.append(ls.train(model, task, request.param, test_state=state, out=tmp_path / state, **SETTINGS))
        if state == "best":
            live = model
    return *runs, live


def test_best_state_is_tested_and_the_last_one_stays(trained, bert, task):
    best, last, live = trained
    assert best.meta.states["best"].step < best.meta.states["last"].step
    fresh = models.load(bert, task=task)
    best.restore(fresh, "best")
    encoded = task.encode(models.processor(fresh), task.split("test"))
    score = evaluate(fresh, encoded)
    assert (best.score.metric, best.score.loss) == (score.metric, score.loss)
    assert best.predictions.equals(score.predictions)
    # All else is bitwise that of a run that tests its last state.
    for name, tensor in last.tensors("last").items():
        assert (best.tensors("last")[name] == tensor).all()
    restored = models.load(bert, task=task)
    last.restore(restored)
    for name, parameter in restored.state_dict().items():
        assert torch.equal(live.state_dict()[name], parameter), name
    records, other_records = untested(best.table), untested(last.table)
    assert records["quantity"].tolist() == other_records["quantity"].tolist()
    assert records["value"].equals(other_records["value"])


def test_tested_state_is_named(bert, tmp_path):
    texts = [f"{number} film" for number in range(60)]
    rows = {"text": texts, "label": ["negative", "positive"] * 30, "split": ["train"] * 40 + ["dev"] * 20}
    mapping = {"train": "train", "validation": "dev", "test": "dev"}
    task = tasks.from_frame(pd.DataFrame(rows), splits=mapping)
    model = models.load(bert, task=task)
    run = ls.train(model, task, "lora", steps=4, test_state="best", out=tmp_path / "run", progress=False)
    assert run.meta.tested_state == "best state, selected on the reported split"
    assert "(best state, selected on the reported split)" in str(run)


def test_unknown_state_raises_one_line(bert, task, tmp_path):
    with pytest.raises(ValueError, match=r"^test_state must be one of 'last', 'best', got 'first'$"):
        ls.train(models.load(bert, task=task), task, "lora", steps=1, test_state="first", out=tmp_path / "run")
