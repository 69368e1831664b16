"""Selection of neurons by cosine distance, on worked examples."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import FAMILIES, tiny
from tolerance import TINY, near

from lorascope.analysis import neurons
from lorascope.schema.module_table import describe
from lorascope.updates import neuron_change

UP = np.array([[1.0, 0], [0, 2], [3, 4]]), np.array([[1.0, 1], [0, 5], [4, 3]])
DOWN = np.array([[1.0, 2, 0], [1, 0, 2]]), np.array([[1.0, 2, 1], [0, 0, 2]])
ZERO = np.array([[0.0, 0], [1, 2]]), np.array([[1.0, 1], [2, 1]])


def worked() -> pd.DataFrame:
    """Return the scores of a worked example: two inputs and three hidden units."""
    up = neurons.NeuronGroup("layers.0.mlp.up_proj", "", 0, "ffn_in", axis=1, first=0, count=3, width=2)
    down = neurons.NeuronGroup("layers.0.mlp.down_proj", "", 0, "ffn_out", axis=0, first=0, count=3, width=2)
    return pd.concat([neurons.score_neurons(up, *UP), neurons.score_neurons(down, *DOWN)], ignore_index=True)


def made(distances: dict[tuple[int, str], list[float]]) -> pd.DataFrame:
    """Return scores with the given distances by layer and role."""
    rows = [
        {"module": f"{layer}.{role}", "stack": "", "layer": layer, "role": role, "neuron": i, "cosine_distance": value}
        for (layer, role), values in distances.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def chosen(scores, *args, **kwargs):
    found = neurons.select_neurons(scores, *args, **kwargs)
    return list(zip(found["layer"], found["role"], found["neuron"], strict=True))


def test_scores_of_worked_example():
    scores = worked()
    assert list(scores) == list(neurons.COLUMNS)
    expected = 1 - np.array([0.70710678, 1.0, 0.96, 0.70710678, 1.0, 0.89442719])
    assert scores["cosine_distance"].to_numpy() == pytest.approx(expected)
    assert scores["norm_original"].tolist() == pytest.approx([1, 2, 5, 2**0.5, 2, 2])
    assert scores["norm_tuned"].tolist() == pytest.approx([2**0.5, 5, 5, 1, 2, 5**0.5])
    assert scores["delta_norm"].tolist() == pytest.approx([1, 3, 2**0.5, 1, 0, 1])


def test_select_returns_exactly_k_neurons_and_breaks_ties_by_position():
    """The authors' strict threshold would return two neurons of three, and none of two."""
    up, down = (0, "ffn_in"), (0, "ffn_out")
    order = [(*up, 0), (*down, 0), (*down, 2), (*up, 2), (*up, 1), (*down, 1)]
    scores = worked()
    # Rounding errors separate distances that are equal in the example: 1 - sqrt(1/2) twice, and 0 twice.
    scores["cosine_distance"] = scores["cosine_distance"].round(12)
    for k in range(7):
        assert chosen(scores, k) == order[:k]
        assert chosen(scores, k, "reversed") == order[::-1][:k]
    assert neurons.rank_neurons(scores)["rank"].tolist() == [1, 2, 3, 4, 5, 6]


def test_ties_are_ordered_by_layer_role_and_neuron_for_any_row_order():
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


def test_random_neurons_are_drawn_without_repetition():
    scores = made({(0, "ffn_in"): list(np.linspace(0.1, 0.9, 40))})
    drawn = [chosen(scores, 10, "random", seed=seed) for seed in range(100)]
    assert all(len(set(each)) == 10 for each in drawn)
    assert drawn[0] != drawn[1]
    counts = np.bincount([neuron for each in drawn for *_, neuron in each], minlength=40)
    assert np.abs(counts - 25).max() < 5 * 25**0.5 * 0.75**0.5


def test_neuron_with_zero_weights_is_never_selected():
    scores = neurons.score_neurons(
        neurons.NeuronGroup("layers.0.up", "", 0, "ffn_in", axis=1, first=0, count=2, width=2), *ZERO
    )
    assert np.isnan(scores["cosine_distance"][0])
    for mode in neurons.MODES:
        assert chosen(scores, 1, mode) == [(0, "ffn_in", 1)]
    with pytest.raises(ValueError, match=r"k .*0 to 1 .1 of 2.*got 2"):
        neurons.select_neurons(scores, 2)


def test_invalid_selections_raise():
    scores = made({(0, "ffn_in"): [0.1, 0.2]})
    with pytest.raises(ValueError, match=r"k .*got -1"):
        neurons.select_neurons(scores, -1)
    with pytest.raises(ValueError, match=r"mode.*'changed', 'reversed', 'random'.*got 'lowest'"):
        neurons.select_neurons(scores, 1, "lowest")
    still = made({(0, "ffn_in"): [0.0, 0.0]})
    with pytest.raises(ValueError, match=r"cosine_distance.*above 0"):
        neurons.select_neurons(still, 1)
    assert len(neurons.select_neurons(still, 1, "random")) == 1


def test_count_of_neurons_for_a_fraction_of_the_parameters():
    """LLaMA-2-7B: 9% of all parameters are 148,061 vectors of 4,096, and 9.12% are 150,035."""
    total, width = 6_738_415_616, 4096
    assert neurons.count_for_share(0.09, total, width) == 148_061
    assert neurons.count_for_share(0.0912, total, width) == 150_035


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_every_family(family):
    model = tiny(family)
    found = neurons.list_groups(describe(model))
    assert {(part.role, part.axis) for part in found} == {("ffn_in", 1), ("ffn_out", 0)}
    assert {(part.count, part.width) for part in found} == {(128 if family == "gpt2" else 48, 32)}
    blocks = {(part.stack, part.layer) for part in found}
    assert len(found) == 2 * len(blocks)
    assert len(blocks) == (4 if family in ("t5", "bart") else 2)


def test_fused_gate_and_input_has_one_part_per_half():
    """Phi-3 computes down(up * act(gate)) with gate, up = gate_up.chunk(2); a change is found in the right half."""
    model = tiny("phi3")
    gate, up = neurons.list_groups(describe(model), ("ffn_in", "ffn_gate"))[:2]
    assert (gate.role, gate.first, gate.count, up.role, up.first, up.count) == ("ffn_gate", 0, 48, "ffn_in", 48, 48)
    assert [part.role for part in neurons.list_groups(describe(model))] == ["ffn_in", "ffn_out"] * 2
    mlp = model.model.layers[0].mlp
    x = torch.randn(3, 32)
    with torch.no_grad():
        weight = mlp.gate_up_proj.weight
        hidden = mlp.activation_fn(x @ weight[gate.slices].T) * (x @ weight[up.slices].T)
        assert mlp(x).numpy() == near(hidden @ mlp.down_proj.weight.T, terms=TINY)
        before = weight.detach().numpy().copy()
        weight[48 + 7] += 1.0
    scores = neurons.score_neurons(up, before, weight.detach().numpy())
    assert scores.loc[scores["cosine_distance"] > 0, "neuron"].tolist() == [55]


def test_parts_of_a_missing_role_raises():
    with pytest.raises(ValueError, match="'ffn_gate' matches no module"):
        neurons.list_groups(describe(tiny("gpt2")), ("ffn_in", "ffn_gate"))


def test_neuron_cosine_along_the_other_axis():
    assert 1 - neuron_change(*DOWN, axis=1).cosine_distance == pytest.approx([0.91287, 0.89443], abs=1e-5)
