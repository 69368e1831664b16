"""Baseline allocations: exact budgets, known distributions, and hand-counted parameters."""

from __future__ import annotations

from itertools import product
from math import comb, factorial, prod
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import blocks

from lorascope.adapters.delta import attached_deltas
from lorascope.analysis import baseline_ranks
from lorascope.methods import LoRA
from lorascope.schema import module_table

NAMES = ["c", "a", "b"]
COUNTS = st.integers(1, 9)


def test_uniform_gives_the_remainder_to_the_first_modules() -> None:
    assert baseline_ranks.uniform(NAMES, 8) == {"c": 3, "a": 3, "b": 2}
    assert baseline_ranks.uniform(NAMES, 2) == {"c": 1, "a": 1, "b": 0}


@given(count=COUNTS, cap=COUNTS, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_allocations_use_the_exact_budget(count: int, cap: int, share: float, seed: int) -> None:
    modules = [f"m{number}" for number in range(count)]
    budget = max(1, round(share * count * cap))
    even = baseline_ranks.uniform(modules, budget)
    free, capped = (baseline_ranks.random(modules, budget, seed, most) for most in (None, cap))
    for ranks in (even, free, capped):
        assert list(ranks) == modules
        assert sum(ranks.values()) == budget
        assert min(ranks.values()) >= 0
    assert max(even.values()) - min(even.values()) <= 1
    assert max(capped.values()) <= cap


def test_random_with_a_cap_is_hypergeometric() -> None:
    """Compare frequencies over seeds with the counted probabilities for three modules of two components."""
    draws, budget, cap = 4000, 3, 2
    found = [tuple(baseline_ranks.random(NAMES, budget, seed, cap).values()) for seed in range(draws)]
    total = comb(len(NAMES) * cap, budget)
    for ranks in product(range(cap + 1), repeat=3):
        ways = comb(cap, ranks[0]) * comb(cap, ranks[1]) * comb(cap, ranks[2]) if sum(ranks) == budget else 0
        assert found.count(ranks) / draws == pytest.approx(ways / total, abs=4 * 0.5 / draws**0.5)


def test_random_without_a_cap_is_multinomial_and_depends_on_the_seed_only() -> None:
    """Compare frequencies over seeds with the counted probabilities: each of three units goes to any module."""
    draws, budget = 4000, 3
    found = [tuple(baseline_ranks.random(NAMES, budget, seed).values()) for seed in range(draws)]
    for ranks in product(range(budget + 1), repeat=3):
        ways = factorial(budget) / prod(map(factorial, ranks)) if sum(ranks) == budget else 0
        assert found.count(ranks) / draws == pytest.approx(ways / 3**budget, abs=4 * 0.5 / draws**0.5)
    assert found[7] == tuple(baseline_ranks.random(NAMES, budget, 7).values())


@pytest.mark.parametrize(
    ("modules", "budget", "cap", "reason"),
    [
        (NAMES, 0, None, "budget.*got 0"),
        ([], 3, None, "modules.*got none"),
        (["a", "a"], 3, None, "modules.*got a, a"),
        (NAMES, 7, 2, "budget.*6.*got 7"),
    ],
)
def test_random_with_invalid_arguments_raises(modules: list[str], budget: int, cap: int | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        baseline_ranks.random(modules, budget, 0, cap)


def test_equal_parameters_matches_the_groups_of_adaloras_figure_1() -> None:
    """The ranks are hand-computed for DeBERTa-base and 276,480 parameters."""
    modules = pd.DataFrame(blocks(12)).assign(tied="")
    by_type = {role: role for role in ("q", "k", "v", "o", "ffn_in", "ffn_out")}
    by_layers = {f"{count} layers": rf".*layer\.[0-{count - 1}]\..*" for count in (4, 2, 1)}
    assert list(baseline_ranks.equal_parameters(modules, by_type, 276_480).values()) == [15, 15, 15, 15, 6, 6]
    assert list(baseline_ranks.equal_parameters(modules, by_layers, 276_480).values()) == [5, 10, 20]
    assert list(baseline_ranks.equal_parameters(modules, by_type).values()) == [5, 5, 5, 5, 2, 2]
    reason = r"parameters.*3 layers.*18 modules.*got 276,480.*248,832 .rank 6.*290,304 .rank 7"
    with pytest.raises(ValueError, match=reason):
        baseline_ranks.equal_parameters(modules, {"3 layers": r".*layer\.[0-2]\..*"}, 276_480)
    with pytest.raises(ValueError, match=r"parameters.*few.*2 modules.*got 5.*7,680 .rank 1"):
        baseline_ranks.equal_parameters(modules, {"few": ["encoder.layer.0.ffn_in", "encoder.layer.0.ffn_out"]}, 5)


def test_equal_parameters_of_a_tied_weight_is_the_same_for_each_name() -> None:
    columns = {"stack": "", "layer": pd.array([None], "Int16"), "role": "embed", "in_features": 7, "out_features": 3}
    modules = pd.DataFrame({"module": ["wte"], "tied": "lm_head"} | columns)
    assert baseline_ranks.equal_parameters(modules, {"in": ["wte"], "out": ["lm_head"]}, 20) == {"in": 2, "out": 2}


def test_lora_accepts_an_allocation_as_rank(fresh_bert: Any) -> None:
    modules = module_table.match(module_table.describe(fresh_bert), ("q", "v"))
    ranks = baseline_ranks.random(modules, 7, seed=3, cap=4)
    LoRA(rank=ranks).attach(fresh_bert)
    assert {name: delta.rank for name, delta in attached_deltas(fresh_bert).items()} == {
        n: r for n, r in ranks.items() if r
    }
