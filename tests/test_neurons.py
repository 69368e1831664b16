"""Which neurons a ranking by cosine distance chooses, on worked numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lorascope.analysis import neurons
from lorascope.update import neuron_cosine

UP = np.array([[1.0, 0], [0, 2], [3, 4]]), np.array([[1.0, 1], [0, 5], [4, 3]])
DOWN = np.array([[1.0, 2, 0], [1, 0, 2]]), np.array([[1.0, 2, 1], [0, 0, 2]])
ZERO = np.array([[0.0, 0], [1, 2]]), np.array([[1.0, 1], [2, 1]])


def worked() -> pd.DataFrame:
    """The sheet's example of a feed-forward part with two inputs and three hidden units."""
    found = [("mlp.up_proj", "ffn_in", *UP, 1), ("mlp.down_proj", "ffn_out", *DOWN, 0)]
    return pd.concat(
        [neurons.table(f"layers.0.{name}", "", 0, role, *pair, axis) for name, role, *pair, axis in found],
        ignore_index=True,
    )


def made(distances: dict[tuple[int, str], list[float]]) -> pd.DataFrame:
    """Scores with the distances given by layer and role."""
    rows = [
        {"module": f"{layer}.{role}", "stack": "", "layer": layer, "role": role, "neuron": i, "cosine_distance": value}
        for (layer, role), values in distances.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def chosen(scores, *args, **kwargs):
    found = neurons.select(scores, *args, **kwargs)
    return list(zip(found["layer"], found["role"], found["neuron"], strict=True))


def test_the_scores_of_the_worked_example():
    scores = worked()
    assert list(scores) == list(neurons.COLUMNS)
    expected = 1 - np.array([0.70710678, 1.0, 0.96, 0.70710678, 1.0, 0.89442719])
    assert scores["cosine_distance"].to_numpy() == pytest.approx(expected)
    assert scores["norm_original"].tolist() == pytest.approx([1, 2, 5, 2**0.5, 2, 2])
    assert scores["norm_tuned"].tolist() == pytest.approx([2**0.5, 5, 5, 1, 2, 5**0.5])
    assert scores["delta_norm"].tolist() == pytest.approx([1, 3, 2**0.5, 1, 0, 1])


def test_exactly_k_with_ties_broken_by_place():
    """The authors' strict threshold would return two neurons of three, and none of two."""
    up, down = (0, "ffn_in"), (0, "ffn_out")
    order = [(*up, 0), (*down, 0), (*down, 2), (*up, 2), (*up, 1), (*down, 1)]
    scores = worked()
    # What rounding parts the hand-made example ties: 1 - sqrt(1/2) twice, and 0 twice.
    scores["cosine_distance"] = scores["cosine_distance"].round(12)
    for k in range(7):
        assert chosen(scores, k) == order[:k]
        assert chosen(scores, k, "reversed") == order[::-1][:k]
    assert neurons.ranked(scores)["rank"].tolist() == [1, 2, 3, 4, 5, 6]


def test_ties_go_by_layer_then_role_then_neuron_whatever_the_order_of_the_rows():
    scores = made({(1, "ffn_in"): [0.5, 0.5], (0, "ffn_out"): [0.5, 0.5], (0, "ffn_gate"): [0.5], (0, "ffn_in"): [0.5]})
    order = [
        (0, "ffn_in", 0),
        (0, "ffn_gate", 0),
        (0, "ffn_out", 0),
        (0, "ffn_out", 1),
        (1, "ffn_in", 0),
        (1, "ffn_in", 1),
    ]
    for seed in range(3):
        shuffled = scores.sample(frac=1, random_state=seed)
        assert chosen(shuffled, 6) == order
        assert chosen(shuffled, 2, "reversed") == order[:3:-1]
        assert chosen(shuffled, 3, "random", seed=1) == chosen(scores, 3, "random", seed=1)


def test_random_neurons_are_drawn_from_the_pool_without_repetition():
    scores = made({(0, "ffn_in"): list(np.linspace(0.1, 0.9, 40))})
    drawn = [chosen(scores, 10, "random", seed=seed) for seed in range(200)]
    assert all(len(set(each)) == 10 for each in drawn)
    assert drawn[0] != drawn[1]
    counts = np.bincount([neuron for each in drawn for *_, neuron in each], minlength=40)
    assert np.abs(counts - 50).max() < 5 * 50**0.5 * 0.75**0.5


def test_a_neuron_without_direction_is_never_chosen():
    scores = neurons.table("layers.0.up", "", 0, "ffn_in", *ZERO, axis=1)
    assert np.isnan(scores["cosine_distance"][0])
    for mode in neurons.MODES:
        assert chosen(scores, 1, mode) == [(0, "ffn_in", 1)]
    with pytest.raises(ValueError, match=r"k 2 .*0 to 1 neurons .1 of 2"):
        neurons.select(scores, 2)


def test_wrong_choices_are_refused():
    scores = made({(0, "ffn_in"): [0.1, 0.2]})
    with pytest.raises(ValueError, match="k -1"):
        neurons.select(scores, -1)
    with pytest.raises(ValueError, match=r"lowest.*changed, reversed, random"):
        neurons.select(scores, 1, "lowest")
    still = made({(0, "ffn_in"): [0.0, 0.0]})
    with pytest.raises(ValueError, match="no neuron has turned"):
        neurons.select(still, 1)
    assert len(neurons.select(still, 1, "random")) == 1


def test_k_by_share_of_the_parameters():
    """LLaMA-2-7B: 9 % of all parameters are 148,061 vectors of 4,096; the sheet's 150,000 are 9.12 %."""
    total, width = 6_738_415_616, 4096
    assert neurons.count(0.09, total, width) == 148_061
    assert 150_000 * width / total == pytest.approx(0.0912, abs=1e-4)
    assert neurons.count(0.0912, total, width) == pytest.approx(150_000, abs=50)


def test_the_worked_axis():
    assert 1 - neuron_cosine(*DOWN, axis=1) == pytest.approx([0.91287, 0.89443], abs=1e-5)
