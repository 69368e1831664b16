"""Tests of estimates over seeds: worked numbers, the classical t-test, and simulated coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from lorascope.analysis.seed_intervals import (
    Estimate,
    jackknife_estimate,
    pseudo_values,
    t_estimate,
    t_interval,
    two_way_estimate,
)

WORKED = np.array([[1.0, 0, -1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
CLUSTERS = np.array([0, 0, 1, 2])


def test_two_way_interval_of_the_worked_table() -> None:
    found = two_way_estimate(WORKED, CLUSTERS)
    # V_seed = 1/48, V_row = 43/768, V_cell = 31/1152; their sum is below V_row, which it replaces.
    (whole, degrees), (seeds, seed_degrees) = found.errors
    assert found.mean == 0.25
    assert (whole**2, seeds**2) == pytest.approx((43 / 768, 1 / 48), rel=1e-12)
    assert (degrees, seed_degrees) == (2, 2)
    assert found.half_width(0.025) == pytest.approx(1.01810, abs=5e-6)


def test_two_way_interval_is_not_narrower_than_over_seeds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        table = rng.normal(rng.normal(size=(4, 1)) * 3, 1, (4, 60))
        found, seeds = two_way_estimate(table, np.arange(60) // 2), t_interval(table.mean(axis=1))
        assert found.half_width(0.025) >= (seeds.high - seeds.low) / 2 - 1e-12
        assert found.mean == pytest.approx(seeds.mean)


def brute_two_way(table: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """Compute the three variances with loops, as their definition reads."""
    seeds, rows = table.shape
    names = sorted(set(clusters.tolist()))
    by_seed = [sum(table[s]) / rows for s in range(seeds)]
    mean = sum(by_seed) / seeds
    v_seed = sum((a - mean) ** 2 for a in by_seed) / (seeds - 1) / seeds
    b = [sum(table[s, r] for s in range(seeds)) / seeds - mean for r in range(rows)]
    g = {c: sum(b[r] for r in range(rows) if clusters[r] == c) for c in names}
    v_row = len(names) / (len(names) - 1) * sum(each**2 for each in g.values()) / rows**2
    h = [
        sum(table[s, r] - by_seed[s] for r in range(rows) if clusters[r] == c) - g[c]
        for s, c in itertools.product(range(seeds), names)
    ]
    return v_seed, v_row, sum(each**2 for each in h) / (seeds * (seeds - 1) * rows**2)


def test_two_way_variances_equal_those_of_loops() -> None:
    rng = np.random.default_rng(1)
    for seeds, rows in ((3, 12), (5, 31)):
        table, clusters = rng.normal(size=(seeds, rows)) + rng.normal(size=rows), rng.integers(0, rows // 2, rows)
        v_seed, v_row, v_cell = brute_two_way(table, clusters)
        (whole, degrees), (alone, _) = two_way_estimate(table, clusters).errors
        total = max(v_seed + v_row - v_cell, v_seed, v_row)
        number = len(np.unique(clusters))
        parts = v_seed**2 / (seeds - 1) + v_row**2 / (number - 1) + v_cell**2 / ((seeds - 1) * (number - 1))
        assert (whole**2, alone**2) == pytest.approx((total, v_seed), rel=1e-10)
        assert degrees == pytest.approx(max(total**2 / parts, seeds - 1), rel=1e-10)


def test_two_way_interval_covers_the_mean_of_random_seeds_and_clusters() -> None:
    rng, covered, repetitions = np.random.default_rng(2), 0, 400
    clusters = np.arange(80) // 4
    for _ in range(repetitions):
        seeds, rows = rng.normal(0, 0.1, (5, 1)), rng.normal(0, 0.4, 20)[clusters]
        low, high = two_way_estimate(seeds + rows + rng.normal(0, 0.5, (5, 80)), clusters).interval(0.025)[1:3]
        covered += low < 0 < high
    # At 95% the share has a standard error of 1.1%; the interval may be wider than nominal, but not narrower.
    assert covered / repetitions > 0.95 - 3 * 0.011


def test_rows_that_all_seeds_answer_alike_leave_the_interval_over_seeds() -> None:
    table = np.array([[0.2] * 6, [0.5] * 6, [0.3] * 6])
    found, seeds = two_way_estimate(table, np.arange(6)), t_interval(table.mean(axis=1))
    assert (found.interval(0.025).low, found.interval(0.025).high) == pytest.approx((seeds.low, seeds.high))


def test_jackknife_of_three_worked_taus() -> None:
    pairs = np.array([[np.nan, 0.6, 0.2], [0.6, np.nan, 0.4], [0.2, 0.4, np.nan]])
    found = jackknife_estimate(pseudo_values(pairs))
    assert found.mean == pytest.approx(0.4)
    assert found.half_width(0.025) == pytest.approx(0.993655, abs=5e-7)


def test_jackknife_leaves_out_a_seed_in_both_arms_and_never_pairs_equal_seeds() -> None:
    rng = np.random.default_rng(3)
    pairs = rng.normal(size=(4, 4))
    off = [(i, j) for i, j in itertools.product(range(4), repeat=2) if i != j]
    whole = np.mean([pairs[at] for at in off])
    expected = [4 * whole - 3 * np.mean([pairs[i, j] for i, j in off if left not in (i, j)]) for left in range(4)]
    assert pseudo_values(pairs) == pytest.approx(expected)
    np.fill_diagonal(pairs, 1e6)
    assert pseudo_values(pairs) == pytest.approx(expected)


def test_jackknife_below_three_seeds_has_no_interval() -> None:
    found = jackknife_estimate(pseudo_values(np.array([[0.0, 0.5], [0.7, 0.0]])))
    assert found.mean == pytest.approx(0.6)
    assert np.isnan(found.half_width(0.025))


def test_p_values_are_those_of_the_t_test() -> None:
    values = np.random.default_rng(4).normal(0.3, 1, 9)
    found = t_estimate(values)
    for bound in (-0.5, 0.0, 0.8):
        assert found.p_above(bound) == pytest.approx(
            scipy.stats.ttest_1samp(values, bound, alternative="greater").pvalue
        )
        assert found.p_below(bound) == pytest.approx(scipy.stats.ttest_1samp(values, bound, alternative="less").pvalue)


@pytest.mark.parametrize("level", [0.005, 0.0215, 0.025])
def test_interval_ends_at_the_bound_whose_p_value_is_the_level(level: float) -> None:
    found = two_way_estimate(WORKED, CLUSTERS)
    _, low, high, n = found.interval(level)
    assert n == 3
    assert found.p_above(low) == pytest.approx(level)
    assert found.p_below(high) == pytest.approx(level)


def test_equal_values_have_an_interval_of_width_zero() -> None:
    found = t_estimate(np.full(5, 0.2))
    assert found.interval(0.005) == (0.2, 0.2, 0.2, 5)
    assert (found.p_above(0.1), found.p_above(0.2), found.p_above(0.3)) == (0.0, 1.0, 1.0)


def test_interval_of_one_seed_is_unknown() -> None:
    assert np.isnan(t_estimate(np.array([0.3])).half_width(0.025))
    assert np.isnan(Estimate(0.3, 1, ()).p_above(0.0))
