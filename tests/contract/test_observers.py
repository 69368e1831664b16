"""Contract of every observer, with one row each: the method it watches, and everything that it records."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from forks import WALL_CLOCK, interruption_after, same
from killing import SETTINGS

import lorascope as ls
from lorascope import observe
from lorascope.inputs import models, tasks
from lorascope.observe.observer import Observer
from lorascope.schema.records import QUANTITIES

METHODS = {
    "adapprox": ls.Adapprox(min_dim=8),
    "fourierft": ls.FourierFT(coefficients=20),
    "full": ls.Full(),
    "lora": ls.LoRA(rank=2, targets=("q", "ffn_in"), dropout=0.3),
}
SHORT = SETTINGS | {"steps": 3}
_SCHEMES = ("l1_p5", "l2_p5", "l5_p0", "l5_p5", "svd", "svd_lowrank")


@dataclass(frozen=True)
class ObserverRow:
    """A method of ``METHODS``, and the quantities and snapshots that the observer adds to its records."""

    method: str
    quantities: frozenset[str]
    snapshots: frozenset[str] = frozenset()
    saves_factors: bool = False


def row(method: str, *quantities: str, snapshots: tuple[str, ...] = (), saves_factors: bool = False) -> ObserverRow:
    return ObserverRow(method, frozenset(quantities), frozenset(snapshots), saves_factors)


ROWS = {
    "alarms": row("lora"),  # the run is healthy
    "coefficients": row("fourierft", "coefficient_gradient", "coefficient_importance"),
    "factor_drift": row("adapprox", "factor_drift", "factor_drift_least", "factor_drift_rank_one"),
    "factor_optimum": row("adapprox", "factor_step_error", "factor_step_error_least"),
    "factorings": row("full", *(f"factoring_{what}_{how}" for what in ("error", "seconds") for how in _SCHEMES)),
    "factors": row("lora", saves_factors=True),
    "gradients": row("lora", "gradient_norm"),
    "kl": row("lora", "drift_keep", "drift_task", "row_loss"),
    "memory": row("lora", "gradient_bytes", "optimizer_bytes", "parameter_bytes"),
    "neurons": row(
        "lora",
        "neuron_cosine",
        "neuron_update",
        "sensitivity_in",
        "sensitivity_out",
        "shuffled_sensitivity_in",
        "shuffled_sensitivity_out",
    ),
    "norms": row(
        "lora",
        "adapter_norm",
        "effective_rank",
        "factor_change",
        "learned_norm",
        "rank",
        "relative_update",
        "stable_rank",
        "step_norm",
        "update_norm",
        "weight_norm",
        snapshots=("singular_values",),
    ),
    "second_moments": row(
        "full",
        "moment_error",
        "moment_error_dealt",
        "moment_error_rank_one",
        "moment_error_s_rsi",
        "moment_sigma",
        "moment_sigma_dealt",
    ),
    "utilization": row("lora", "utilisation", "utilisation_layer"),
}
EVERY = pytest.mark.parametrize("name", ROWS)


def own_observers() -> dict[str, type[Observer]]:
    """Return the observers of this package by name."""
    found = {
        name: each for name, each in vars(observe).items() if isinstance(each, type) and issubclass(each, Observer)
    }
    return {name: each for name, each in found.items() if each is not Observer}


def test_every_observer_has_a_row() -> None:
    assert ROWS.keys() == own_observers().keys()


@EVERY
def test_observer_survives_json(name: str) -> None:
    observer = own_observers()[name](every=3)
    stored = json.loads(json.dumps(observer.config()))
    assert stored.pop("name") == name
    assert own_observers()[name](**stored) == observer


class Trained(NamedTuple):
    run: ls.Run
    draws: tuple[float, float, float]


@pytest.fixture(scope="module")
def task(task: tasks.Task) -> tasks.Task:
    """Divide the tiny task again, with as many validation rows as the intervals of a gauge need."""
    rows = task.table.drop(columns=["split", "draw"], errors="ignore")
    splits = ["validation"] * 40 + ["test"] * 20 + ["train"] * (len(rows) - 60)
    return tasks.from_frame(rows.assign(split=splits), "toy")


@pytest.fixture(scope="module")
def train(bert, task, tmp_path_factory):
    """Return a function that trains the method of a row once, with or without its observer every so many steps."""

    @cache
    def once(method: str, name: str = "", every: int = 1) -> Trained:
        observers = [own_observers()[name](every=every)] if name else []
        out = tmp_path_factory.mktemp("observed") / "run"
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        run = ls.train(models.load(bert, task=task), task, METHODS[method], observe=observers, out=out, **SHORT)
        return Trained(run, (random.random(), np.random.random(), float(torch.rand(()))))

    return once


@EVERY
def test_observer_records_what_its_row_says(name: str, train) -> None:
    expected = ROWS[name]
    without, run = train(expected.method).run, train(expected.method, name).run
    quantities = set(run.table["quantity"].unique())
    assert quantities - set(without.table["quantity"].unique()) == expected.quantities
    names = {each.rpartition("/")[2] for each in run.snapshot_names()}
    assert names - {each.rpartition("/")[2] for each in without.snapshot_names()} == expected.snapshots
    for quantity in expected.quantities:
        assert QUANTITIES[quantity].label
        assert QUANTITIES[quantity].definition


@EVERY
def test_observer_records_at_its_steps(name: str, train) -> None:
    for every, steps in ((1, {1, 2, 3}), (2, {2, 3})):
        run = train(ROWS[name].method, name, every).run
        added = run.table[run.table["quantity"].isin(ROWS[name].quantities)]
        assert set(added["quantity"]) == ROWS[name].quantities
        for quantity, rows in added.groupby("quantity", observed=True):
            assert set(rows["step"]) - {0} == steps, quantity
        if ROWS[name].saves_factors:
            assert {step: bool(run.factors(step=step)) for step in steps} == dict.fromkeys(steps, True)
            with pytest.raises(ValueError, match="step"):
                run.factors(step=({1, 2, 3, 4} - steps).pop())


@EVERY
def test_observer_leaves_the_training_as_it_is(name: str, train) -> None:
    """Weights, other records and random numbers are the same, bit for bit."""
    (without, draws), (run, other_draws) = train(ROWS[name].method), train(ROWS[name].method, name)
    assert run.tensors().keys() == without.tensors().keys()
    for key, tensor in without.tensors().items():
        assert (run.tensors()[key] == tensor).all(), key
    tables = []
    for each in (without, run):
        kept = each.table[~each.table["quantity"].isin(ROWS[name].quantities | WALL_CLOCK)]
        tables.append(kept.drop(columns="run").astype(str).reset_index(drop=True))
    pd.testing.assert_frame_equal(*tables)
    assert draws == other_draws


@EVERY
def test_resumed_run_equals_one_without_interruption(name: str, train, bert, task, tmp_path: Path) -> None:
    def again() -> None:
        observers = [own_observers()[name](every=1)]
        model = models.load(bert, task=task)
        ls.train(model, task, METHODS[ROWS[name].method], observe=observers, out=tmp_path / "run", **SHORT)

    with interruption_after(2):
        again()
    again()
    same(tmp_path / "run", train(ROWS[name].method, name).run.path)
