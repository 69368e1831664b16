"""Overlap of selections and shifts of utilization ranks on hand-computed examples."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lorascope.analysis import neuron_utilization, selected_neurons


def named(*numbers):
    return frozenset(("m", number) for number in numbers)


def test_common_matches_a_hand_computed_example():
    found = selected_neurons.compare_selections(named(1, 2, 3, 4), named(3, 4, 5, 6), pool=40)
    assert (found["n_common"], found["overlap"], found["jaccard"]) == (2, 0.5, pytest.approx(1 / 3))
    assert found["chance"] == pytest.approx(4 / 40)
    assert selected_neurons.compare_selections(named(1, 2), named(1, 2), pool=9)["overlap"] == 1


def test_common_random_baseline_matches_random_draws():
    draw = np.random.default_rng(0)
    samples = [set(draw.choice(50, 20, replace=False)) for _ in range(2000)]
    shared = [len(sample & set(range(10))) / 10 for sample in samples]
    found = selected_neurons.compare_selections(named(*range(10)), named(*range(100, 120)), pool=50)
    assert found["chance"] == pytest.approx(np.mean(shared), abs=0.01)
    assert np.mean(np.array(shared) <= found["most"]) >= 0.95
    assert np.mean(np.array(shared) <= found["most"] - 0.1) < 0.95


def test_overlaps_within_a_label_use_different_selections():
    found = selected_neurons.compare_all_selections({"a": [named(1, 2), named(1, 3)], "b": [named(4, 5)]}, pool=10)
    assert found[["first", "second", "n_common"]].to_numpy().tolist() == [["a", "a", 1], ["a", "b", 0], ["a", "b", 0]]


def test_correlations_match_a_hand_computed_example():
    one = np.array([[1.0, 2, 3, 4], [5, 5, 5, 5]])
    assert neuron_utilization.correlations(one, np.array([[1.0, 3, 2, 4]])).tolist() == [[pytest.approx(0.8)], [0]]
    other = neuron_utilization.correlations(-one, np.array([[1.0, 3, 2, 4], [2, 2, 2, 2]]))
    assert other.tolist() == [[pytest.approx(0.8), 0], [0, 0]]


def test_span_starts_or_ends_at_the_layer_of_the_neuron():
    layers = list(range(4))
    assert [layers[neuron_utilization.compared_layers(layer)] for layer in (0, 2)] == [[0, 1, 2, 3], [2, 3]]
    assert [layers[neuron_utilization.compared_layers(layer, "earlier")] for layer in (0, 2)] == [[0], [0, 1, 2]]


FIRST = (0.9, 0.1, 0.5, 0.3, 0.7)
SECOND = (0.2, 0.8, 0.5, 0.9, 0.6)


def scored(values, role="ffn_in"):
    rows = {"module": role, "role": role, "neuron": range(len(values)), "value": values}
    return pd.DataFrame(rows)


def test_rank_shift_matches_a_hand_computed_example(monkeypatch):
    monkeypatch.setattr(neuron_utilization, "STRONG", 3 / 5)
    trained = pd.DataFrame({"module": ["ffn_in"], "neuron": [0]})
    found = neuron_utilization.compute_rank_shift(scored(FIRST), scored(SECOND), trained)
    assert (found["rank_1"] - 1).tolist() == [0, 4, 2, 3, 1]
    assert (found["rank_2"] - 1).tolist() == [4, 1, 3, 0, 2]
    assert found["d_rank"].tolist() == [4, -3, 1, -3, 1]
    kinds = {kind: found.index[found[kind]].tolist() for kind in ("strong", "suppressed", "indirect")}
    assert kinds == {"strong": [0, 1, 3], "suppressed": [1, 3], "indirect": [1, 3]}
    assert neuron_utilization.count_shifts(found) == {
        "strong": 3,
        "suppressed": 2,
        "indirect": 2,
        "avg_abs_d_rank": 2.4,
    }


def test_rank_shift_uses_ranks_and_thresholds_per_role():
    first = pd.concat([scored(FIRST), scored((0.2, 0.1), "ffn_out")])
    second = pd.concat([scored(FIRST), scored((0.1, 0.2), "ffn_out")])
    found = neuron_utilization.compute_rank_shift(first, second, pd.DataFrame({"module": [], "neuron": []}))
    assert found["rank_1"].max() == 5
    assert found.loc[found["role"] == "ffn_out", "rank_1"].tolist() == [1, 2]
    assert found.loc[found["strong"], ["role", "d_rank"]].to_numpy().tolist() == [["ffn_out", 1], ["ffn_out", -1]]
    assert found.loc[found["suppressed"], "neuron"].tolist() == [1]


def test_buckets_count_every_neuron_once():
    same = scored(list(np.linspace(1, 0.1, 100)))
    moved = same.assign(value=same["value"].where(same["neuron"] != 99, 2.0))
    shifts = neuron_utilization.compute_rank_shift(moved, same, pd.DataFrame({"module": [], "neuron": []}))
    found = neuron_utilization.average_shifts(shifts)
    assert found["n"].tolist() == [1, 2, 7, 20, 20, 20, 20, 7, 2, 1, 100]
    assert found["value"].tolist() == [1] * 9 + [99, pytest.approx(1.98)]
    assert found[["low", "high"]].iloc[[0, -2, -1]].to_numpy().tolist() == [[0, 0.01], [0.99, 1], [0, 1]]
