"""Test full fine-tuning with other optimizers: CAME in numpy, Adafactor's settings, and unchanged ids."""

from __future__ import annotations

import killing
import numpy as np
import pytest
import torch
from forks import interruption_after, same
from tolerance import near
from transformers.optimization import Adafactor

import lorascope as ls
from lorascope.inputs import models
from lorascope.methods import Full
from lorascope.methods.method import config
from lorascope.methods.optimizers.came import CAME


def by_hand(W, gradients, lr, betas, eps, decay, clip):
    """Compute CAME of a matrix in numpy, line by line."""
    beta1, beta2, beta3 = betas
    rows, columns, M = np.zeros(len(W)), np.zeros(W.shape[1]), np.zeros_like(W)
    odd_rows, odd_columns = np.zeros(len(W)), np.zeros(W.shape[1])
    for G in gradients:
        squares = G**2 + eps[0]
        rows = beta2 * rows + (1 - beta2) * squares.mean(1)
        columns = beta2 * columns + (1 - beta2) * squares.mean(0)
        D = G / np.sqrt(np.outer(rows, columns) / rows.mean())
        D = D / max(1, np.sqrt((D**2).mean()) / clip)
        M = beta1 * M + (1 - beta1) * D
        odd = (D - M) ** 2 + eps[1]
        odd_rows = beta3 * odd_rows + (1 - beta3) * odd.mean(1)
        odd_columns = beta3 * odd_columns + (1 - beta3) * odd.mean(0)
        S = np.outer(odd_rows, odd_columns) / odd_rows.mean()
        W = W - lr * (M / np.sqrt(S) + decay * W)
    return W


def test_came_matches_numpy():
    draw = np.random.default_rng(0)
    W, gradients = draw.standard_normal((5, 4)), draw.standard_normal((3, 5, 4))
    p = torch.nn.Parameter(torch.from_numpy(W).float())
    optimizer = CAME([p], 0.01, weight_decay=0.1)
    for G in gradients:
        p.grad = torch.from_numpy(G).float()
        optimizer.step()
    expected = by_hand(W, gradients, 0.01, (0.9, 0.999, 0.9999), (1e-30, 1e-16), 0.1, 1.0)
    assert p.detach().numpy() == near(expected, terms=5, depth=3 * 10, growth=10)  # D - M loses digits by cancellation


def test_first_step_of_came_matches_worked_numbers():
    """W moves by 0.1 / (0.9 / 100) = 11.11 times the learning rate.

    Row means are 2.5 and 2.5, column means 1 and 4, so that R C / mean(R) is the square of G. The averages start at a
    thousandth of them, so D is 31.6 times the sign of G, and clipping reduces it to the sign. M is a tenth of D, D - M
    is nine tenths, and S is its square, 0.81, times 1e-4.
    """
    p = torch.nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.tensor([[1.0, -2.0], [-1.0, 2.0]])
    CAME([p], 0.01).step()
    assert p.flatten().tolist() == near([-1 / 9, 1 / 9, 1 / 9, -1 / 9], depth=20)


def test_came_updates_vectors_by_the_first_moment():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, -0.5])
    optimizer = CAME([p], 0.01)
    losses = optimizer.step(lambda: 7.0)
    assert losses == 7.0
    assert p.tolist() == near([-0.001, 0.001], depth=20)
    assert optimizer.state[p].keys() == {"exp_avg", "exp_avg_sq"}


def test_default_optimizer_name_does_not_change_the_config():
    assert config(Full()) == {"name": "full", "lr": 1e-4, "head_lr": 1e-4, "search_share": 0}
    other = config(Full(optimizer_name="came"))
    assert other["optimizer_name"] == "came"


def test_optimizer_name_selects_the_optimizer(fresh_bert):
    methods = {name: Full(optimizer_name=name) for name in ("adamw", "adafactor", "came")}
    kinds = {name: method.optimizer(fresh_bert, 1e-3, 2e-3, 0.1) for name, method in methods.items()}
    assert [type(found) for found in kinds.values()] == [torch.optim.AdamW, Adafactor, CAME]
    for found in kinds.values():
        rates = {group["name"]: group["lr"] for group in found.param_groups}
        assert rates == {"adapter": 1e-3, "head": 2e-3}
        assert {group["weight_decay"] for group in found.param_groups} == {0.1, 0.0}
    assert kinds["adafactor"].defaults["beta1"] == 0.9
    assert not kinds["adafactor"].defaults["scale_parameter"]


@pytest.mark.parametrize("rule", ["adafactor", "came"])
def test_killed_run_resumes_bitwise(rule, bert, task, tmp_path):
    settings = killing.SETTINGS | {"observe": killing.observers()}
    method = Full(optimizer_name=rule, lr=1e-3)
    whole = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "whole", **settings)
    assert whole.summary()["update_norm"].gt(0).all()
    with interruption_after(4):
        ls.train(models.load(bert, task=task), task, method, out=tmp_path / "out", **settings)
    ls.train(models.load(bert, task=task), task, method, out=tmp_path / "out", **settings)
    same(tmp_path / "out", tmp_path / "whole")
