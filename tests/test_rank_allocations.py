"""Tables of ranks, compared with hand-computed numbers, SciPy's tau, and the statistics of random draws."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import blocks
from scipy import stats

from lorascope.analysis import norms, rank_allocations
from lorascope.schema import records
from lorascope.schema.records import Record

MODULES = pd.DataFrame(blocks(3, ("q", "ffn_in"), hidden=10)).astype({"layer": "Int16"})


def name(layer: int, role: str) -> str:
    return f"encoder.layer.{layer}.{role}"


def table(at: dict[int, list[int]], run: str = "a", modules: pd.DataFrame = MODULES) -> pd.DataFrame:
    """Return a records table from step -> ranks of q0, ffn_in0, q1 ..."""
    rows = [
        (step, Record("rank", value, module))
        for step, values in at.items()
        for module, value in zip(modules["module"], values, strict=True)
    ]
    return records.frame(run, rows, modules)


def several(*values: list[int]) -> pd.DataFrame:
    """Return the current ranks of runs a, b, ..."""
    runs = [table({9: found}, run) for run, found in zip("abcdefgh", values, strict=False)]
    return rank_allocations.current_ranks(records.concat(runs))


HISTORY = {0: [4] * 6, 3: [4, 3, 2, 4, 1, 0], 9: [5, 0, 1, 2, 0, 4]}


def test_current_ranks_are_the_last_recorded_up_to_a_step() -> None:
    found = table(HISTORY)
    assert rank_allocations.current_ranks(found)["value"].tolist() == HISTORY[9]
    assert rank_allocations.current_ranks(found, 8)["value"].tolist() == HISTORY[3]
    assert set(rank_allocations.current_ranks(found, 8)["step"]) == {8}
    assert rank_allocations.current_ranks(found, 0)["value"].tolist() == [4] * 6
    late = found[(found["step"] < 9) | (found["module"] != name(0, "q"))]
    assert rank_allocations.current_ranks(late)["value"].tolist() == [4, *HISTORY[9][1:]]
    with pytest.raises(ValueError, match=r"step.*got -1"):
        rank_allocations.current_ranks(found, -1)


def test_current_ranks_of_a_folder_exist_at_the_end_only() -> None:
    folder = table({-1: HISTORY[9]})
    assert rank_allocations.current_ranks(folder)["value"].tolist() == HISTORY[9]
    with pytest.raises(ValueError, match=r"step.*got 9"):
        rank_allocations.current_ranks(folder, 9)


def test_pool_sums_ranks_by_layer_and_role() -> None:
    found = rank_allocations.current_ranks(table(HISTORY))
    layers, roles = (norms.pool_modules(found, by) for by in (("place",), ("role",)))
    assert dict(zip(layers["place"], layers["value"], strict=True)) == {"0": 5, "1": 3, "2": 4}
    assert dict(zip(roles["role"], roles["value"], strict=True)) == {"q": 6, "ffn_in": 6}


def test_parameters_are_ranks_times_inputs_plus_outputs() -> None:
    found = rank_allocations.current_ranks(table(HISTORY))
    spent = rank_allocations.add_parameters(found, MODULES)["parameters"]
    assert spent.tolist() == [5 * 20, 0, 1 * 20, 2 * 50, 0, 4 * 50]
    unsized = rank_allocations.add_parameters(found, MODULES.drop(columns=["in_features", "out_features"]))[
        "parameters"
    ]
    assert unsized.isna().all()


@pytest.mark.parametrize(("layers", "sizes"), [(12, [4, 4, 4]), (2, [1, 0, 1]), (5, [2, 1, 2]), (1, [0, 1, 0])])
def test_thirds_have_equal_size(layers: int, sizes: list[int]) -> None:
    modules = pd.DataFrame(blocks(layers, ("q",))).astype({"layer": "Int16"})
    third = rank_allocations.depth_thirds(rank_allocations.current_ranks(table({9: [1] * layers}, modules=modules)))
    assert third.value_counts(sort=False).tolist() == sizes
    assert third.is_monotonic_increasing


@given(st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=2, max_size=4))
def test_kendall_tau_matches_scipy(values: list[list[int]]) -> None:
    found = rank_allocations.kendall_tau(np.array(values, dtype=np.float64))
    expected = [stats.kendalltau(one, two).statistic for one, two in combinations(values, 2)]
    assert found[np.triu_indices(len(values), 1)] == pytest.approx(expected, nan_ok=True)


def test_stability_is_the_mean_over_pairs_with_a_jackknife_interval() -> None:
    runs = [[5, 0, 1, 2, 0, 4], [4, 1, 1, 2, 0, 3], [0, 5, 2, 1, 4, 0], [3, 0, 2, 2, 1, 4]]
    pairs = {(i, j): stats.kendalltau(runs[i], runs[j]).statistic for i, j in combinations(range(4), 2)}
    mean = np.mean(list(pairs.values()))
    pseudo = [4 * mean - 3 * np.mean([tau for pair, tau in pairs.items() if left not in pair]) for left in range(4)]
    found = rank_allocations.stability(several(*runs))
    low, high = stats.t.interval(0.95, 3, np.mean(pseudo), stats.sem(pseudo))
    assert found == pytest.approx((mean, low, high, 4))
    two = rank_allocations.stability(several(*runs[:2]))
    assert two == pytest.approx((pairs[0, 1], np.nan, np.nan, 2), nan_ok=True)
    assert np.isnan(rank_allocations.stability(several(runs[0])).mean)


def test_stability_ignores_modules_missing_in_a_run() -> None:
    both = several([5, 0, 1, 2, 0, 4], [4, 1, 1, 2, 0, 3])
    part = both[(both["run"] != "b") | (both["module"] != name(0, "q"))]
    assert rank_allocations.stability(part).mean == pytest.approx(
        stats.kendalltau([0, 1, 2, 0, 4], [1, 1, 2, 0, 3]).statistic
    )


def test_random_ranks_keep_budget_and_cap_and_differ_between_runs() -> None:
    drawn = rank_allocations.random_ranks(several([6, 0, 0, 0, 0, 6], [6, 0, 0, 0, 0, 6]), cap=6)
    values = drawn.groupby("run", observed=True)["value"].agg(list)
    assert [sum(row) for row in values] == [12, 12]
    assert values["a"] != values["b"]
    assert drawn["value"].max() <= 6


def test_random_stability_has_the_null_distribution_of_tau() -> None:
    modules = pd.DataFrame(blocks(12)).astype({"layer": "Int16"})
    learned = [table({9: [8] * 72}, run, modules) for run in "abc"]
    found = rank_allocations.random_stability(rank_allocations.current_ranks(records.concat(learned)), cap=12)
    assert found.shape == (200,)
    n = 72
    deviation = np.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))  # standard deviation of tau without ties
    assert abs(found.mean()) < 4 * deviation / np.sqrt(3 * 200)
    assert found.std() == pytest.approx(deviation / np.sqrt(3), rel=0.2)


def test_cap_is_the_initial_rank_unless_a_module_exceeds_it() -> None:
    assert rank_allocations.initial_cap(table({0: [4] * 6, 9: [4, 0, 1, 2, 0, 4]})) == 4
    assert rank_allocations.initial_cap(table(HISTORY)) is None
    assert rank_allocations.initial_cap(table({-1: [4, 0, 1, 2, 0, 4]})) == 4
