"""Test that reordered sums stay within the tolerances and that another formula does not."""

from __future__ import annotations

import copy

import pytest
import torch
from test_autolora import filled
from tiny import FAMILIES, inputs, tiny
from tolerance import TEXT, amplification, forward, near, rounding
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorascope.adapters.delta import attached_deltas, fold
from lorascope.methods import AutoLoRA

aten = torch.ops.aten


class Reordered(TorchDispatchMode):
    """Mode that reorders the sums of all matrix products at random, as another processor might."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default):
            *bias, left, right = args
            order = torch.randperm(left.shape[-1], generator=self.generator)
            args = (*bias, left[..., order], right[..., order, :])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_reordered_sums_stay_within_tolerance_and_another_formula_does_not(family):
    model = tiny(family, tie_word_embeddings=False)
    AutoLoRA(targets=("all-linear", "embed"), rank=3).attach(model)
    given, folded = inputs(model), copy.deepcopy(filled(model))
    fold(folded)
    exact = copy.deepcopy(model).double()(**given).logits
    bound = forward(model, given)
    for seed in range(8):
        with Reordered(seed):
            found = [each(**given).logits for each in (model, folded)]
        assert all((logits - exact).norm() <= bound * exact.norm() for logits in found)
    next(iter(attached_deltas(model).values())).logits.add_(torch.tensor([0.01, 0, 0]))
    assert (model(**given).logits - exact).norm() > 3 * bound * exact.norm()


@pytest.mark.parametrize(("weights", "growth"), [([1.0, 1.0], 1), ([1.0, -0.999], 1000)])
def test_amplification_matches_the_condition_number_of_a_sum(weights, growth):
    host = nn.Linear(2, 1, bias=False)
    host.weight.data = torch.tensor([weights])
    found = amplification(host, lambda host: host(torch.ones(1, 2, dtype=torch.float64)), draws=16)
    assert growth <= found < 4 * growth


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_amplification_of_tiny_text_models_is_below_its_constant(family):
    model = tiny(family)
    assert 1 <= amplification(model, lambda model: model(**inputs(model)).logits) < TEXT


def test_rounding_counts_terms_until_their_random_sum_is_smaller():
    eps = torch.finfo(torch.float32).eps
    assert rounding(terms=3, depth=4) == 12 * eps
    assert rounding(terms=100) == 60 * eps
    assert rounding(torch.bfloat16, growth=3) == 3 * 2**-7


def test_near_is_relative_to_the_largest_entry():
    assert near([0.0, 1.0]) == [1e-7, 1.0]
    assert near([0.0, 1.0]) != [3e-7, 1.0]
    assert torch.tensor([0.0, 8.0]).numpy() == near(torch.tensor([9e-7, 8.0]))
