"""Tests of the order in which loss, gradients and weights of recorded runs stopped being finite."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorascope.diagnosis.nonfinite import first_nonfinite

FINE = {step: 1.0 for step in range(1, 11)}
COARSE = {0: 1.0, 10: math.nan}
EVERY = {step: 1.0 if step < 5 else math.nan for step in range(11)}


def broken_from(first: int) -> dict[int, float]:
    return {step: 1.0 if step < first else math.nan for step in range(1, 11)}


@pytest.mark.parametrize(
    ("updates", "losses", "gradients", "expected"),
    [
        (EVERY, broken_from(5), {}, "the weights were finite before step 5, its loss was not"),
        (EVERY, broken_from(5), broken_from(5), "the weights were finite before step 5, its loss was not"),
        (EVERY, broken_from(6), broken_from(5), "the loss of step 5 was finite, its gradients were not"),
        (EVERY, broken_from(6), {}, "the loss of step 5 was finite, the weights after it were not"),
        (EVERY, FINE, FINE, "the loss of step 5 was finite, the weights after it were not"),
        (EVERY, {}, {}, ""),
        ({0: math.inf, 10: math.nan}, broken_from(1), {}, "the weights were not finite before training"),
        (COARSE, broken_from(5), {}, "the weights were finite at step 0 and the loss until step 4"),
        (COARSE, broken_from(5), broken_from(4), "the loss of step 4 was finite, its gradients were not"),
        (COARSE, FINE | {3: math.nan}, {}, "the weights were finite at step 0 and the loss until step 2"),
        ({0: 1.0, 10: 1.0}, broken_from(5), {}, ""),
    ],
)
def test_first_nonfinite_value_is_named(updates, losses, gradients, expected):
    rows = []
    for quantity, values in {"update_norm": updates, "loss": losses, "grad_norm": gradients}.items():
        for module in ("a", "b") if quantity == "update_norm" else ("",):
            rows += [(step, module, quantity, value) for step, value in values.items()]
    assert first_nonfinite(pd.DataFrame(rows, columns=["step", "module", "quantity", "value"])) == expected
