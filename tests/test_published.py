"""Effects of published figures: the numbers that were derived by hand, and each from the rows of its table."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from lorascope.papers.judging import first_edition, published_numbers

FOLDER = Path(__file__).parents[1] / "data" / "published"


def test_fourierft_is_within_two_points_of_lora_and_below_it() -> None:
    found = published_numbers.fourierft(FOLDER)
    assert tuple(found) == pytest.approx((-0.67, -1.27, -0.07, 5), abs=0.005)


def test_fourierft_of_a_single_cell_is_the_welch_test(tmp_path: Path) -> None:
    for name in ("fourierft_glue_cells.csv", "fourierft_glue_seeds.csv"):
        table = pd.read_csv(FOLDER / name)
        table[(table["task"] == "sst2") & (table["size"] == "base")].to_csv(tmp_path / name, index=False)
    found, cell = published_numbers.fourierft(tmp_path), pd.read_csv(tmp_path / "fourierft_glue_cells.csv").iloc[0]
    scores = pd.read_csv(tmp_path / "fourierft_glue_seeds.csv").query("used")["best"]
    test = scipy.stats.ttest_ind_from_stats(
        scores.mean(),
        scores.std(),
        len(scores),
        cell["lora_printed_median"],
        cell["lora_printed_sd"],
        5,
        equal_var=False,
    )
    assert found.mean == pytest.approx(scores.mean() - cell["lora_printed_median"])
    half = (found.high - found.low) / 2
    degrees = cell["welch_df"]
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, degrees) * found.mean / test.statistic, rel=0.01)
    assert (found.low, found.high) == pytest.approx((cell["low"], cell["high"]), abs=0.01)


def test_autolora_spreads_little_more_than_random_logits() -> None:
    found = published_numbers.autolora(FOLDER)
    assert tuple(found) == pytest.approx((0.1195, 0.0589, 0.1802, 22), abs=1e-3)


def test_autolora_expectation_is_that_of_random_logits() -> None:
    # The threshold at the mean logit keeps each of 8 components that is above the mean of its module.
    logits = np.random.default_rng(0).standard_normal((20_000, 24, 8))
    ranks = (logits >= logits.mean(axis=2, keepdims=True)).sum(axis=2)
    chance = pd.read_csv(FOLDER / "autolora_chance.csv").iloc[0]
    assert ranks.std(axis=1, ddof=1).mean() == pytest.approx(chance["expected_sd_of_24"], abs=0.004)


def test_autolora_agrees_with_its_own_data_set_no_more_than_with_others() -> None:
    assert tuple(published_numbers.autolora_data(FOLDER)) == (-0.0235, -0.1109, 0.0612, 22)


def test_adalora_has_less_than_a_third_in_feed_forward_matrices_in_both_sizes() -> None:
    found = published_numbers.adalora(FOLDER)
    assert (found.low + 1 / 3, found.high + 1 / 3) == pytest.approx((0.2823, 0.3125), abs=5e-4)
    printed = pd.read_csv(FOLDER / "adalora_parameters.csv")
    assert found.mean + 1 / 3 == pytest.approx(printed["ffn_share_implied"].mean(), abs=5e-4)
    # An allocation of the same rank everywhere has a third there, and the count that follows from it.
    uniform = printed["budget"] * (published_numbers._ATTENTION * 2 / 3 + published_numbers._FEED_FORWARD / 3) / 1e6
    assert uniform.tolist() == pytest.approx(printed["uniform_millions"].tolist(), abs=5e-5)


def test_losses_of_two_pairs_and_gains_without_runs_decide_nothing() -> None:
    losses, gains = published_numbers.neft_loss(FOLDER), published_numbers.hydralora(FOLDER)
    assert (losses.mean, losses.n) == (pytest.approx((0.2359 + 0.206) / 2), 2)
    assert (gains.mean, gains.n) == (2.05, 0)


def test_chance_of_the_overlap_is_hypergeometric() -> None:
    table = published_numbers.neft_overlap(FOLDER)
    row = table.iloc[0]
    law = scipy.stats.hypergeom(row["pool"], row["neurons"], row["neurons"])
    assert row["chance"] == pytest.approx(law.mean() / row["neurons"])
    assert row["chance_sd"] == pytest.approx(law.std() / row["neurons"], rel=0.01)
    assert (table["overlap"] > 2 * table["chance"]).all()


def test_changed_published_number_is_named_by_its_result(tmp_path: Path) -> None:
    for folder in ("published", "edition-1"):
        shutil.copytree(FOLDER.parent / folder, tmp_path / folder, ignore=shutil.ignore_patterns("figures"))
    folder, file = tmp_path / "edition-1", tmp_path / "published" / "neft_dev_loss.csv"
    assert list(published_numbers.verify_published(folder)) == []
    table = pd.read_csv(file)
    table.assign(best_loss=table["best_loss"].where(table["method"] != "NeFT", 0.5)).to_csv(file, index=False)
    lines = list(published_numbers.verify_published(folder))
    assert lines[0].startswith("edition-1: published.csv: row 7 (published.neft_loss 0.220")
    file.unlink()
    (line,) = published_numbers.verify_published(folder)
    assert "cannot compute published.neft_loss" in line


def test_verdicts_on_published_figures() -> None:
    claims = {id: claim for id, claim in first_edition.read_claims().items() if claim.published}
    found = published_numbers.judge_published(claims, FOLDER).set_index("claim")
    assert found["outcome"].to_dict() == {
        "published.fourierft": "inconclusive",
        "published.autolora": "not supported",
        "published.autolora_data": "not supported",
        "published.adalora": "not supported",
        "published.neft_loss": "inconclusive",
        "published.hydralora": "inconclusive",
        "published.neft": "shown, not judged",
    }
    assert list(found.index) == list(claims)
    assert found["shown"]["published.neft"] == "0.63 to 0.76; chance 0.07 to 0.28"
    assert found["shown"]["published.hydralora"] == "2.05 [no interval]"
