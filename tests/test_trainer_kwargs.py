"""Our methods under transformers' Trainer: the same weights as from ``train``, bit for bit."""

from __future__ import annotations

import pytest
from trainers import METHODS, by_train, by_trainer, fresh, same_weights


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", list(METHODS))
def test_both_loops_give_the_same_weights(name, accumulate, bert, task, tmp_path):
    method = METHODS[name]
    expected, _, rows = by_train(bert, task, method, tmp_path / "run", accumulate=accumulate, clip=0.1)
    model = fresh(bert, task)
    by_trainer(model, rows, tmp_path / "out", method, clip=0.1, accumulate=accumulate)
    same_weights(model, expected)
