"""Recipes beside each other: scipy's paired test, Holm by hand, planted orders, and no rank for what overlaps."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from lorascope.analysis import recipe_comparison
from lorascope.analysis.recipe_comparison import describe_comparison, holm, paired_p, pairs, recipes, scores, standings
from lorascope.runs.run import Run


def made(values: dict[str, list[float]], metric: str = "accuracy", task: str = "toy") -> pd.DataFrame:
    rows = [
        {"model": "m", "task": task, "metric": metric, "recipe": recipe, "seed": seed, "value": value, "run": ""}
        for recipe, found in values.items()
        for seed, value in enumerate(found)
    ]
    return pd.DataFrame(rows)


def test_p_is_that_of_scipys_paired_test():
    one, other = np.random.default_rng(0).normal(size=(2, 5))
    assert paired_p(one - other) == pytest.approx(ttest_rel(one, other).pvalue)
    assert np.isnan(paired_p(np.array([1.0])))
    assert paired_p(np.zeros(3)) == 1
    assert paired_p(np.ones(3)) == 0


def test_holm_by_hand():
    # sorted 0.01 0.02 0.04, times 3 2 1: 0.03 0.04 0.04; the order given stays, and what cannot be tested counts not
    assert holm(np.array([0.04, np.nan, 0.01, 0.02])).tolist() == pytest.approx([0.04, np.nan, 0.03, 0.04], nan_ok=True)
    assert holm(np.array([0.6, 0.5])).tolist() == [1.0, 1.0]


def test_a_planted_order_is_found_and_what_overlaps_gets_no_place():
    # b and c differ by 0.001 with a deviation of 0.01; a lies 0.1 above both, with hardly any
    table = made({"b": [0.70, 0.71, 0.69, 0.70], "a": [0.80, 0.81, 0.791, 0.80], "c": [0.71, 0.70, 0.70, 0.69]})
    compared = pairs(table)
    assert compared["better"].tolist() == ["a", "", "a"]
    found = standings(table, compared).set_index("recipe")
    assert found.index.tolist() == ["b", "a", "c"]  # as given, not by the mean
    assert found[["first", "last"]].to_numpy().tolist() == [[2, 3], [1, 1], [2, 3]]
    assert found.loc["a", "value"] == pytest.approx(0.80025)
    told = describe_comparison(compared)
    assert told[0].startswith("a is better than b by 0.1003 [0.09945, 0.101] (p ")
    assert told[-1] == "overlapping, so not ranked: b and c"


def test_pairing_tells_apart_what_intervals_do_not():
    noise = np.array([0.0, 0.1, 0.2, 0.3])
    table = made({"low": list(noise), "high": list(noise + np.array([0.010, 0.011, 0.009, 0.010]))})
    compared = pairs(table)
    assert compared["better"].tolist() == ["high"]
    assert standings(table, compared)["low"].tolist()[1] < 0.15  # the intervals overlap by far
    by_lot = made({"low": list(noise), "high": list(noise[::-1] + 0.01)})
    assert pairs(by_lot)["better"].tolist() == [""]


def test_a_lower_perplexity_is_better():
    table = made({"a": [5.0, 5.1, 5.0], "b": [9.0, 9.1, 9.05]}, "perplexity")
    assert pairs(table)["better"].tolist() == ["a"]
    assert "a is better than b by 4.017 [" in describe_comparison(pairs(table))[0]


def test_two_seeds_decide_nothing():
    table = made({"a": [0.9, 0.9], "b": [0.1, 0.1]})
    compared = pairs(table)
    assert compared["better"].tolist() == [""]
    assert standings(table, compared)[["first", "last"]].to_numpy().tolist() == [[1, 2], [1, 2]]
    assert describe_comparison(compared) == ["overlapping, so not ranked (fewer than 3 seeds decide nothing): a and b"]


def test_only_seeds_that_both_have_are_paired():
    table = made({"a": [0.9, 0.8, 0.85], "b": [0.1, 0.2]})
    assert pairs(table)["n"].tolist() == [2]
    assert pairs(made({"a": [0.5]})).empty


def test_tasks_are_judged_apart():
    table = pd.concat([made({"a": [0.9, 0.91, 0.9], "b": [0.1, 0.12, 0.1]}, task=task) for task in ("one", "two")])
    assert pairs(table)["p"].nunique() == 1  # two families of one test each, not one of two
    assert [line.partition(":")[0] for line in describe_comparison(pairs(table))] == ["m, one", "m, two"]


def test_no_order_comes_of_noise():
    """Of 200 sweeps of four equal recipes, no more than the level says rank anything (binomial bound at 5 %: 18)."""
    draw = np.random.default_rng(0)
    ranked = sum(any(pairs(made({r: list(draw.normal(size=5)) for r in "abcd"}))["better"] != "") for _ in range(200))
    assert ranked <= 18


def test_recipes_are_told_by_what_differs_within_a_label():
    labels = ["LoRA", "LoRA", "Full"]
    settings = [{"lr": 1e-3, "steps": 3, "clip": 1.0}, {"lr": 1e-4, "steps": 3, "clip": 1.0}, {"lr": 1e-5, "steps": 9}]
    assert recipes(labels, settings) == ["LoRA, lr 0.001", "LoRA, lr 0.0001", "Full"]


def a_run(**meta) -> Run:
    own = {"id": "x", "model": "m", "task": "t", "label": "LoRA, rank by module", "recipe": {"name": "lora"}, "seed": 0}
    own |= {"settings": {"steps": 3, "observers": []}, "w0_hash": "a" * 64, "data_hash": "d" * 64}
    return Run(None, own | {"test": {"name": "accuracy", "metric": 0.5}} | meta)


def test_runs_that_learn_the_same_count_once_and_others_are_told_apart():
    """Two observers, two tables of ranks, two bases of one name, two texts of one name."""
    ranks = [{"name": "lora", "rank": {"q": number}} for number in (2, 4)]
    found = scores([a_run(recipe=ranks[0]), a_run(recipe=ranks[0], settings={"steps": 3, "observers": ["x"]})])
    assert found["recipe"].tolist() == ["LoRA, rank by module"] * 2
    assert standings(found, pairs(found))["n"].tolist() == [1]
    found = scores([a_run(recipe=rank) for rank in ranks])
    assert found["recipe"].tolist() == [f'LoRA, rank by module, rank {{"q": {number}}}' for number in (2, 4)]
    assert len(pairs(found)) == 1
    for key, name in (("w0_hash", "model"), ("data_hash", "task")):
        found = scores([a_run(), a_run(**{key: "b" * 64})])
        assert found[name].nunique() == 2
        assert found[name].iloc[1].endswith(" (bbbbbb)")
        assert standings(found, pairs(found))["n"].tolist() == [1, 1]


def test_words_is_a_deprecated_alias() -> None:
    with pytest.warns(FutureWarning, match="describe_comparison"):
        assert recipe_comparison.words is describe_comparison
