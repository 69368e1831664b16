"""Control allocations: exact budgets, known distributions, and parameters counted by hand."""

from __future__ import annotations

from itertools import product
from math import comb
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


def test_uniform_gives_the_leftovers_to_the_first_in_model_order() -> None:
    assert baseline_ranks.uniform(NAMES, 8) == {"c": 3, "a": 3, "b": 2}
    assert baseline_ranks.uniform(NAMES, 2) == {"c": 1, "a": 1, "b": 0}


@given(count=COUNTS, cap=COUNTS, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_allocation_spends_its_budget_to_the_last_rank(count: int, cap: int, share: float, seed: int) -> None:
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


def test_random_allocations_are_those_of_components_drawn_by_lot() -> None:
    """Frequencies over seeds against the counted hypergeometric probabilities of three modules of two components."""
    draws, budget, cap = 4000, 3, 2
    found = [tuple(baseline_ranks.random(NAMES, budget, seed, cap).values()) for seed in range(draws)]
    total = comb(len(NAMES) * cap, budget)
    for ranks in product(range(cap + 1), repeat=3):
        ways = comb(cap, ranks[0]) * comb(cap, ranks[1]) * comb(cap, ranks[2]) if sum(ranks) == budget else 0
        assert found.count(ranks) / draws == pytest.approx(ways / total, abs=4 * 0.5 / draws**0.5)


def test_without_a_cap_any_rank_can_be_drawn_and_the_seed_decides() -> None:
    found = [baseline_ranks.random(NAMES, 2, seed) for seed in range(60)]
    assert {max(ranks.values()) for ranks in found} == {1, 2}
    assert found[7] == baseline_ranks.random(NAMES, 2, 7)


@pytest.mark.parametrize(
    ("modules", "budget", "cap", "reason"),
    [
        (NAMES, 0, None, "budget 0 allots nothing"),
        ([], 3, None, "got none"),
        (["a", "a"], 3, None, "each named once; got a, a"),
        (NAMES, 7, 2, "budget 7 is more than 3 modules of at most 2 ranks can hold"),
    ],
)
def test_what_cannot_be_allotted_is_refused(modules: list[str], budget: int, cap: int | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        baseline_ranks.random(modules, budget, 0, cap)


def test_adalora_s_figure_1_spends_the_same_parameters_on_every_group() -> None:
    """DeBERTa-base: ranks worked out by hand for 276,480 parameters."""
    modules = pd.DataFrame(blocks(12)).assign(tied="")
    by_type = {role: role for role in ("q", "k", "v", "o", "ffn_in", "ffn_out")}
    by_layers = {f"{count} layers": rf".*layer\.[0-{count - 1}]\..*" for count in (4, 2, 1)}
    assert list(baseline_ranks.equal_parameters(modules, by_type, 276_480).values()) == [15, 15, 15, 15, 6, 6]
    assert list(baseline_ranks.equal_parameters(modules, by_layers, 276_480).values()) == [5, 10, 20]
    assert list(baseline_ranks.equal_parameters(modules, by_type).values()) == [5, 5, 5, 5, 2, 2]
    reason = r"3 layers: no whole rank of its 18 modules costs 276,480; 248,832 at rank 6 and 290,304 at rank 7"
    with pytest.raises(ValueError, match=reason):
        baseline_ranks.equal_parameters(modules, {"3 layers": r".*layer\.[0-2]\..*"}, 276_480)
    with pytest.raises(ValueError, match="2 modules costs 5; 7,680 at rank 1"):
        baseline_ranks.equal_parameters(modules, {"few": ["encoder.layer.0.ffn_in", "encoder.layer.0.ffn_out"]}, 5)


def test_a_tied_weight_costs_the_same_under_each_of_its_names() -> None:
    columns = {"stack": "", "layer": pd.array([None], "Int16"), "role": "embed", "in_features": 7, "out_features": 3}
    modules = pd.DataFrame({"module": ["wte"], "tied": "lm_head"} | columns)
    assert baseline_ranks.equal_parameters(modules, {"in": ["wte"], "out": ["lm_head"]}, 20) == {"in": 2, "out": 2}


def test_lora_takes_what_an_allocation_gives(fresh_bert: Any) -> None:
    modules = module_table.match(module_table.describe(fresh_bert), ("q", "v"))
    ranks = baseline_ranks.random(modules, 7, seed=3, cap=4)
    LoRA(rank=ranks).attach(fresh_bert)
    assert {name: delta.rank for name, delta in attached_deltas(fresh_bert).items()} == {
        n: r for n, r in ranks.items() if r
    }
