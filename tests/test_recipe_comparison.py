"""Comparison of recipes: SciPy's paired test, hand-computed Holm adjustment, and planted orders and ties."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted import manifest
from scipy.stats import ttest_rel

from lorascope.analysis.recipe_tests import (
    collect_scores,
    compare_pairs,
    describe_comparison,
    holm,
    name_recipes,
    paired_p,
    standings,
)
from lorascope.runs.run import Run


def made(
    values: dict[str, list[float]], metric: str = "accuracy", task: str = "toy", lower_is_better: bool = False
) -> pd.DataFrame:
    rows = [
        {"model": "m", "task": task, "metric": metric, "recipe": recipe, "seed": seed, "value": value, "run": ""}
        for recipe, found in values.items()
        for seed, value in enumerate(found)
    ]
    return pd.DataFrame(rows).assign(lower_is_better=lower_is_better)


def test_paired_p_matches_scipy():
    one, other = np.random.default_rng(0).normal(size=(2, 5))
    assert paired_p(one - other) == pytest.approx(ttest_rel(one, other).pvalue)
    assert np.isnan(paired_p(np.array([1.0])))
    assert paired_p(np.zeros(3)) == 1
    assert paired_p(np.ones(3)) == 0


def test_holm_matches_a_hand_computed_example():
    # Sorted 0.01, 0.02, 0.04, times 3, 2, 1: 0.03, 0.04, 0.04. The input order is kept; NaN does not count as a test.
    assert holm(np.array([0.04, np.nan, 0.01, 0.02])).tolist() == pytest.approx([0.04, np.nan, 0.03, 0.04], nan_ok=True)
    assert holm(np.array([0.6, 0.5])).tolist() == [1.0, 1.0]


def test_comparison_finds_a_planted_order_and_leaves_ties_open():
    # The means of b and c are equal; a is 0.1 above both.
    table = made({"b": [0.70, 0.71, 0.69, 0.70], "a": [0.80, 0.81, 0.791, 0.80], "c": [0.71, 0.70, 0.70, 0.69]})
    compared = compare_pairs(table)
    assert compared["better"].tolist() == ["a", "", "a"]
    found = standings(table, compared).set_index("recipe")
    assert found.index.tolist() == ["b", "a", "c"]  # the input order, not that of the means
    assert found[["first", "last"]].to_numpy().tolist() == [[2, 3], [1, 1], [2, 3]]
    assert found.loc["a", "value"] == pytest.approx(0.80025)
    lines = describe_comparison(compared)
    assert lines[0].startswith("a is better than b by 0.1003 [0.09945, 0.101] (p ")
    assert lines[-1] == "no significant difference: b and c"


def test_pairing_finds_a_difference_despite_overlapping_intervals():
    noise = np.array([0.0, 0.1, 0.2, 0.3])
    table = made({"low": list(noise), "high": list(noise + np.array([0.010, 0.011, 0.009, 0.010]))})
    compared = compare_pairs(table)
    assert compared["better"].tolist() == ["high"]
    assert standings(table, compared)["low"].tolist()[1] < 0.15  # the intervals overlap by far
    unpaired = made({"low": list(noise), "high": list(noise[::-1] + 0.01)})
    assert compare_pairs(unpaired)["better"].tolist() == [""]


def test_lower_perplexity_is_better():
    table = made({"a": [5.0, 5.1, 5.0], "b": [9.0, 9.1, 9.05]}, "perplexity", lower_is_better=True)
    assert compare_pairs(table)["better"].tolist() == ["a"]
    assert "a is better than b by 4.017 [" in describe_comparison(compare_pairs(table))[0]


def test_two_seeds_are_never_significant():
    table = made({"a": [0.9, 0.9], "b": [0.1, 0.1]})
    compared = compare_pairs(table)
    assert compared["better"].tolist() == [""]
    assert standings(table, compared)[["first", "last"]].to_numpy().tolist() == [[1, 2], [1, 2]]
    assert describe_comparison(compared) == ["no significant difference (fewer than 3 seeds): a and b"]


def test_pairs_use_the_common_seeds_only():
    table = made({"a": [0.9, 0.8, 0.85], "b": [0.1, 0.2]})
    assert compare_pairs(table)["n"].tolist() == [2]
    assert compare_pairs(made({"a": [0.5]})).empty


def test_tasks_are_compared_separately():
    table = pd.concat([made({"a": [0.9, 0.91, 0.9], "b": [0.1, 0.12, 0.1]}, task=task) for task in ("one", "two")])
    assert compare_pairs(table)["p"].nunique() == 1  # each task is a separate family of one test
    assert [line.partition(":")[0] for line in describe_comparison(compare_pairs(table))] == ["m, one", "m, two"]


def test_noise_is_rarely_significant():
    """Over 200 sweeps of four equal recipes, the family-wise error rate is at most the level (binomial bound: 18)."""
    draw = np.random.default_rng(0)
    ranked = sum(
        any(compare_pairs(made({r: list(draw.normal(size=5)) for r in "abcd"}))["better"] != "") for _ in range(200)
    )
    assert ranked <= 18


def test_recipe_names_include_the_settings_that_differ():
    labels = ["LoRA", "LoRA", "Full"]
    settings = [{"lr": 1e-3, "steps": 3, "clip": 1.0}, {"lr": 1e-4, "steps": 3, "clip": 1.0}, {"lr": 1e-5, "steps": 9}]
    assert name_recipes(labels, settings) == ["LoRA, lr 0.001", "LoRA, lr 0.0001", "Full"]


def a_run(**meta) -> Run:
    own = {"id": "x", "model": "m", "task": "t", "label": "LoRA, rank by module", "recipe": {"name": "lora"}, "seed": 0}
    own |= {"settings": {"steps": 3, "observers": []}, "w0_hash": "a" * 64, "data_hash": "d" * 64}
    return Run(None, manifest(**own | {"test": {"name": "accuracy", "metric": 0.5, "loss": 0.1}} | meta))


def test_direction_of_a_metric_is_stored_in_the_run():
    def is_lower_better(**test) -> bool:
        scored = a_run(test={"metric": 0.5, "loss": 0.1, **test})
        return collect_scores([scored])["lower_is_better"].item()

    assert is_lower_better(name="perplexity")
    assert is_lower_better(name="error", values={"error": 0.5}, higher_is_better=False)
    assert not is_lower_better(name="accuracy")
    assert not is_lower_better(name="f1", values={"f1": 0.5}, higher_is_better=True)


def test_duplicate_runs_count_once_and_different_ones_are_distinguished():
    """The cases are two observers, two tables of ranks, two models with one name, and two tasks with one name."""
    ranks = [{"name": "lora", "rank": {"q": number}} for number in (2, 4)]
    found = collect_scores([a_run(recipe=ranks[0]), a_run(recipe=ranks[0], settings={"steps": 3, "observers": ["x"]})])
    assert found["recipe"].tolist() == ["LoRA, rank by module"] * 2
    assert standings(found, compare_pairs(found))["n"].tolist() == [1]
    found = collect_scores([a_run(recipe=rank) for rank in ranks])
    assert found["recipe"].tolist() == [f'LoRA, rank by module, rank {{"q": {number}}}' for number in (2, 4)]
    assert len(compare_pairs(found)) == 1
    for key, name in (("w0_hash", "model"), ("data_hash", "task")):
        found = collect_scores([a_run(), a_run(**{key: "b" * 64})])
        assert found[name].nunique() == 2
        assert found[name].iloc[1].endswith(" (bbbbbb)")
        assert standings(found, compare_pairs(found))["n"].tolist() == [1, 1]
