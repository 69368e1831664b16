"""Tests of the printed numbers of a recipe: they match the published table without data or a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_recipes import RECIPE

import lorascope as ls

ROOT = Path(__file__).parents[1]
OWN_NUMBER = """
[[printed]]
row = "AdaLoRA"
column = "CoLA"
value = 61.5
sd = 0.5
n = 5
"""


@pytest.fixture(scope="module")
def reported() -> pd.DataFrame:
    return pd.read_csv(ROOT / "data/published/reported.csv", dtype={"parameters": "str"})


def test_numbers_match_the_paper_by_column_and_metric(reported):
    scores = ls.recipes.printed_scores("adalora-table1")
    of_paper = reported[(reported["paper"] == "AdaLoRA") & (reported["table"] == "Table 1")]
    of_paper = of_paper[of_paper["data"] != "mean"]  # this recipe has no column of it
    methods = {"AdaLoRA, budget 576": "AdaLoRA, budget 576", "LoRA, rank 8, rate 5e-4": "LoRA, rank 8"}
    for row, method in methods.items():
        ours = scores[scores["row"] == row]
        assert len(ours) == 10  # MNLI and QQP have two numbers
        assert sorted(ours["printed"]) == sorted(of_paper.loc[of_paper["method"] == method, "value"])
    qqp = scores.set_index(["row", "column"]).loc["AdaLoRA, budget 576"].loc[["QQP accuracy", "QQP F1"]]
    assert qqp["metric"].tolist() == ["accuracy", "f1"]
    assert qqp["printed"].tolist() == [92.23, 89.74]


def test_numbers_keep_the_metric_that_a_trial_replaces():
    scores = ls.recipes.printed_scores("lora-table3").set_index("column")
    assert scores.loc["METEOR, medium", ["metric", "printed"]].tolist() == ["meteor", 46.8]


def test_numbers_of_the_file_and_of_means_are_there_without_any_data(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(RECIPE + OWN_NUMBER, encoding="utf-8")
    scores = ls.recipes.printed_scores(file)
    expected = pd.DataFrame(
        [
            ("FourierFT", "CoLA", "matthews_correlation", 63.8, 1.6, 5.0),
            ("AdaLoRA", "CoLA", "matthews_correlation", 61.5, 0.5, 5.0),
            ("FourierFT", "mean", "mean of the columns", 85.0, np.nan, 5.0),
        ],
        columns=["row", "column", "metric", "printed", "printed_sd", "printed_n"],
    )
    pd.testing.assert_frame_equal(scores, expected)


def test_an_own_table_has_no_printed_numbers():
    assert ls.recipes.printed_scores("adapprox-pretrain").empty
