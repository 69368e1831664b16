"""Contract of every observer, with one row each: the method it watches, and everything that it records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from killing import SETTINGS

import lorascope as ls
from lorascope import observe
from lorascope.inputs import models
from lorascope.methods.base import Method
from lorascope.observe.base import Observer
from lorascope.schema.records import QUANTITIES

LORA = ls.LoRA(rank=2, targets=("q", "ffn_in"))
FULL, ADAPPROX = ls.Full(optimizer_name="adamw"), ls.Adapprox(min_dim=8)
_SCHEMES = ("l1_p5", "l2_p5", "l5_p0", "l5_p5", "svd", "svd_lowrank")


@dataclass(frozen=True)
class ObserverRow:
    """A method, and the quantities and snapshots that the observer adds to its records."""

    method: Method
    quantities: frozenset[str]
    snapshots: frozenset[str] = frozenset()


def row(method: Method, *quantities: str, snapshots: tuple[str, ...] = ()) -> ObserverRow:
    return ObserverRow(method, frozenset(quantities), frozenset(snapshots))


ROWS = {
    "coefficients": row(ls.FourierFT(coefficients=20), "coefficient_gradient", "coefficient_importance"),
    "factor_drift": row(ADAPPROX, "factor_drift", "factor_drift_least", "factor_drift_rank_one"),
    "factor_optimum": row(ADAPPROX, "factor_step_error", "factor_step_error_least"),
    "factorings": row(FULL, *(f"factoring_{what}_{how}" for what in ("error", "seconds") for how in _SCHEMES)),
    "factors": row(LORA),
    "memory": row(LORA, "gradient_bytes", "optimizer_bytes", "parameter_bytes"),
    "neurons": row(LORA, "neuron_cosine", "neuron_update", "sensitivity_in", "sensitivity_out"),
    "norms": row(
        LORA,
        "adapter_norm",
        "effective_rank",
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
        FULL,
        "moment_error",
        "moment_error_dealt",
        "moment_error_rank_one",
        "moment_error_s_rsi",
        "moment_sigma",
        "moment_sigma_dealt",
    ),
    "utilization": row(LORA, "utilisation", "utilisation_layer"),
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
    assert stored.pop("name") in (name, type(observer).stored_name)
    assert own_observers()[name](**stored) == observer


@pytest.fixture(scope="module")
def plain(bert, task, tmp_path_factory):
    """Return a function that trains a method once with the given observers."""
    known: dict[str, Any] = {}

    def train(method: Method, observers: list[Observer], key: str) -> ls.Run:
        if key not in known:
            settings = SETTINGS | {"steps": 3, "eval_every": 0}
            out = tmp_path_factory.mktemp("observed") / "run"
            model = models.load(bert, task=task)
            known[key] = ls.train(model, task, method, observe=observers, out=out, **settings)
        return known[key]

    return train


@EVERY
def test_observer_records_what_its_row_says(name: str, plain) -> None:
    expected = ROWS[name]
    without = plain(expected.method, [], expected.method.name)
    run = plain(expected.method, [own_observers()[name](every=1)], name)
    quantities = set(run.table["quantity"].unique())
    assert quantities - set(without.table["quantity"].unique()) == expected.quantities
    names = {each.rpartition("/")[2] for each in run.snapshot_names()}
    assert names - {each.rpartition("/")[2] for each in without.snapshot_names()} == expected.snapshots
    for quantity in expected.quantities:
        steps = run.table.loc[run.table["quantity"] == quantity, "step"]
        assert steps.max() == 3, quantity
        assert QUANTITIES[quantity].label
        assert QUANTITIES[quantity].definition


@EVERY
def test_observer_leaves_the_training_as_it_is(name: str, plain) -> None:
    expected = ROWS[name]
    without, run = (
        plain(expected.method, [], expected.method.name),
        plain(expected.method, [own_observers()[name](every=1)], name),
    )
    for key, tensor in without.tensors().items():
        assert (run.tensors()[key] == tensor).all(), key
