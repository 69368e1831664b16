"""Words, verdicts, cards and alignments of a reading from worked numbers, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from parsed_pages import Tree
from planted import plant
from scipy import stats

import lorascope as ls
from lorascope.analysis.component_blocks import ComponentBlock
from lorascope.analysis.reading import (
    Passage,
    ReadComponent,
    Reading,
    WordOccurrences,
    Written,
    judge_words,
    reading_of_components,
    tabulate_words,
)
from lorascope.analysis.seed_intervals import Estimate
from lorascope.runs.receipt import Receipt

ROWS = 300


def occurrences(word: Any, row: Any, clusters: Any = None, gains: Any = None) -> WordOccurrences:
    rows = np.max(row) + 1
    words = tuple(f"word {number}" for number in range(np.max(word) + 1))
    return WordOccurrences(
        words,
        np.array(word),
        np.array(row),
        np.ones(rows),
        np.ones(rows) if gains is None else np.array(gains),
        np.arange(rows) if clusters is None else np.array(clusters),
    )


def test_a_word_once_per_row_has_the_t_test_of_its_occurrences() -> None:
    values = np.random.default_rng(0).normal(0.1, 1, 20)
    words = occurrences([0] * 20 + [1] * 5, list(range(25)))
    table = tabulate_words(words, np.append(values, np.zeros(5)), np.zeros((1, 4)), np.array([0]))
    test = stats.ttest_1samp(values, 0)
    row = table.iloc[0]
    assert row["occurrences"] == 20
    assert row["t"] == pytest.approx(test.statistic)
    assert row["p"] == pytest.approx(test.pvalue)
    np.testing.assert_allclose(row[["low", "high"]].to_list(), test.confidence_interval(0.95))


def test_occurrences_of_one_row_are_one_sample() -> None:
    """The mean is over occurrences, with the error of the sums of rows."""
    words = occurrences([0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 2, 3, 4])
    estimate = words.estimate(0, np.array([1.0, 2.0, 3.0, 2.0, 4.0, 0.0, 9.0]))
    assert estimate.mean == 2
    # Residuals of the rows: 6 - 3 * 2, 2 - 2, 4 - 2, 0 - 2.
    assert estimate.errors[0] == (pytest.approx(np.sqrt(4 / 3 * (0 + 0 + 4 + 4)) / 6), 3)


def test_a_word_is_testable_with_five_occurrences_in_two_clusters_but_not_in_every_row() -> None:
    word = [0] * 6 + [1] * 5 + [2] * 4 + [3] * 5
    row = [*range(6), *range(5), *range(4), 0, 0, 0, 0, 1]
    assert occurrences(word, row).testable().tolist() == [False, True, False, True]
    assert occurrences(word, row, clusters=[0, 0, 1, 1, 1, 2]).testable().tolist() == [False, True, False, False]


def test_the_rank_among_random_components_ignores_their_sign() -> None:
    words = occurrences([0] * 10 + [1], range(11))
    random = np.array([[-0.3, -0.1, 0.1, 0.5]])
    table = tabulate_words(words, np.append(np.full(10, 0.2), 0), random, np.array([0]))
    assert table["random_p"].item() == 0.5
    assert np.isnan(table["t"].item())  # no spread
    assert table["p"].item() == 0


def test_a_word_is_learned_if_the_margin_of_its_rows_rises() -> None:
    """A row counts once for each of its words."""
    words = occurrences([0, 0, 0, 1, 1], [0, 0, 1, 1, 2], gains=[1.0, -1.5, 2.0])
    assert not words.has_learned(0)
    assert words.has_learned(1)


def table_of(**columns: Any) -> pd.DataFrame:
    defaults = {"contribution": 0.1, "position": 1, "p": 1e-6, "random_p": 0.0, "learned": True}
    return pd.DataFrame({"word": ["w"]} | {name: [value] for name, value in (defaults | columns).items()})


@pytest.mark.parametrize(
    ("columns", "verdict"),
    [
        ({}, "uses"),
        ({"contribution": -0.1}, "not above random"),
        ({"position": 11}, "not above random"),
        ({"p": 0.06}, "not above random"),
        ({"random_p": 0.05}, "not above random"),
        ({"learned": False}, "nothing learned"),
    ],
)
def test_every_verdict_has_its_condition(columns: dict[str, Any], verdict: str) -> None:
    assert judge_words(table_of(**columns))["verdict"].item() == verdict


def test_many_words_of_noise_are_not_used() -> None:
    """Benjamini-Hochberg leaves at most one of 400 words with uniform p."""
    p = np.random.default_rng(3).uniform(size=400)
    noise = pd.concat([table_of(p=value) for value in p])
    assert (judge_words(noise)["verdict"] == "uses").sum() <= 1


@pytest.fixture
def reading() -> Reading:
    """Reading of two components of a square module, the first of which uses a word with markup."""
    generator = np.random.default_rng(0)
    orthonormal, _ = np.linalg.qr(generator.standard_normal((8, 8)))
    receipt = Receipt(run="r", base="b", rows={"reading": "200 rows 1"})
    words = pd.DataFrame(
        {
            "word": ["<b>", "\x1b[2Jgood"],
            "occurrences": [5, 9],
            "contribution": [0.5, 0.1],
            "low": [0.4, -0.1],
            "high": [0.6, 0.3],
            "t": [9.0, 1.0],
            "p": [1e-9, 0.4],
            "random_low": [-0.1, -0.1],
            "random_high": [0.1, 0.1],
            "random_p": [0.0, 0.2],
            "learned": True,
            "position": [1, 2],
        }
    )
    components = []
    for index in range(2):
        block = ComponentBlock(
            "h.0.q", str(index + 1), orthonormal[:, [index]], np.ones(1), orthonormal[:, [index + 2]]
        )
        passage = Passage(["<script>", "good"], [0.5, -0.1])
        table = words if index == 0 else words.assign(random_p=0.5)
        components.append(ReadComponent(block, Estimate(0.2, 200, ((0.01, 199.0),)), table, (passage,)))
    inputs = {"h.0.q": generator.standard_normal((64, 8)) * np.logspace(0, -2, 8)}
    return reading_of_components("run", components, {(1, "<b>"): Written("yes", 1.5)}, inputs, receipt)


def test_a_card_shows_words_verdict_and_what_is_written(reading: Reading) -> None:
    assert reading.card(1).used == ["<b>"]
    assert reading.summary()["uses"].to_list() == ["<b>", ""]
    assert "uses <b>" in repr(reading.card(1))
    assert "writes yes +1.5" in repr(reading.card(1))
    assert "not above random components" in repr(reading.card(2))
    assert "\x1b" not in repr(reading) + repr(reading.card(1)) + reading._repr_html_()
    assert reading.to_json()["table"][1]["effect"] is None


def test_html_of_a_card_is_escaped(reading: Reading) -> None:
    page = Tree(reading._repr_html_()).root
    assert not {"script", "b"} & {node.tag for node in page.walk()}
    assert "<script>" in page.text


def test_the_figure_names_the_random_components(reading: Reading) -> None:
    chart = ls.plots.reading(reading, 2)
    assert "Not above random components." in chart.caption
    assert len(chart.data) == 2
    chart.mpl(width=3.25)
    with pytest.raises(ValueError, match=r"card must be in \[1, 2\], got 3"):
        ls.plots.reading(reading, 3)


def test_a_planted_direction_is_found_and_random_ones_have_uniform_p(reading: Reading, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    u, v = (vector / np.linalg.norm(vector) for vector in generator.standard_normal((2, 64)))
    run = plant(tmp_path, "a", {}, factors={"h.0.q": (3 * u[:, None], v[None, :])})
    found = ls.align(run, {1: u, "h.0.q 1": -u})
    assert found["side"].to_list() == ["u", "u"]
    np.testing.assert_allclose(found["cosine"], 1)
    assert (found["p"] <= 0.001).all()
    # One call per direction, because the numbers of a mapping are distinct.
    random = [
        ls.align(run, {1: generator.standard_normal(64)}, draws=200, seed=seed)["p"].item() for seed in range(200)
    ]
    assert stats.kstest(random, "uniform").pvalue > 0.01


def test_random_inputs_have_uniform_p_only_under_their_covariance(reading: Reading) -> None:
    """Directions that vary as the inputs do are no closer to v than others of this kind."""
    generator, sample = np.random.default_rng(2), reading.inputs["h.0.q"]
    random = []
    for seed in range(200):
        direction = generator.standard_normal(len(sample)) @ sample
        aligned = ls.align(reading, {1: direction}, draws=200, seed=seed).set_index("side")
        random.append(aligned.loc["v", "p"])
    assert stats.kstest(random, "uniform").pvalue > 0.01
    true = ls.align(reading, {2: reading.card(2).block.U[:, 0]}).set_index("side")
    assert true.loc["u", "p"] <= 0.001


def test_bad_directions_get_one_line(reading: Reading, tmp_path: Path) -> None:
    run = plant(tmp_path, "a", {}, factors={"h.0.up": (np.ones((4, 1)), np.ones((1, 3)))})
    for subject, directions, message in (
        (
            run,
            {1: np.ones(5)},
            r"direction of 1 must have shape \(4,\), as the output of h.0.up or \(3,\), as the input",
        ),
        (run, {1: np.zeros(4)}, "direction of 1 must be finite and not zero"),
        (run, {1: np.ones(3)}, "cannot compare direction 1 with the inputs of h.0.up: their covariance was not"),
        (run, {2: np.ones(4)}, "component must be 1 to 1, or a name such as 'h.0.up 1', got 2"),
        (reading, {"h.0.q 3": np.ones(8)}, "component must be 1 to 2, or a name such as 'h.0.q 1', got 'h.0.q 3'"),
    ):
        with pytest.raises(ValueError, match=message):
            ls.align(subject, directions)
    with pytest.raises(ValueError, match="draws must be an integer >= 1, got 0"):
        ls.align(reading, {1: np.ones(8)}, draws=0)


def test_tied_components_are_compared_as_one_span(tmp_path: Path) -> None:
    run = plant(tmp_path, "a", {}, factors={"h.0.up": (np.eye(6)[:, :2], np.eye(2))})
    direction = np.array([1.0, 1.0, 0, 0, 0, 0])
    assert ls.align(run, {"h.0.up 2": direction})["component"].item() == "1-2"
    assert ls.align(run, {1: direction})["cosine"].item() == pytest.approx(1)
