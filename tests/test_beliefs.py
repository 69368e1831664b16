"""Sentences of the second edition, and the table of nine rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from test_study_figures import EARLIER, EMPTY, results_of

from lorascope.papers import registry
from lorascope.papers.judging import registered_study, study_results
from lorascope.papers.judging.beliefs import FILE, belief_differences, headline_table, read_beliefs, readme_differences
from lorascope.papers.judging.csv_tables import to_csv
from lorascope.papers.judging.first_edition import text_estimates
from lorascope.papers.judging.registered_study import STUDY_FILE

FOLDER = STUDY_FILE.parent / "evidence-2"
REGISTERED = registered_study.read()
BELIEFS = read_beliefs(FOLDER)


def rows(results: pd.DataFrame) -> pd.DataFrame:
    return headline_table(BELIEFS, REGISTERED, results, EARLIER).set_index("paper")


def test_rows_have_the_numbers_of_the_results() -> None:
    table = rows(results_of(adalora=8.04, adapprox=-13.0, lisa=0.5, text_lora=-0.5))
    assert len(table) == 9
    assert table.loc["AdaLoRA", ["printed", "text", "truths"]].tolist() == [
        "+0.81",
        "-0.10 [-0.67, 0.46], no headroom (1)",
        "+8.0 / -8.0",
    ]
    assert table.loc["Adapprox", "truths"] == "-13.0% / +13.0%"
    assert table.loc["LISA", "text"] == "-0.032 [-0.073, 0.008] nats (1)"
    # The second edition replaces the first one.
    assert table.loc["LoRA", "text"].startswith("-0.50 [-0.")
    assert table.loc["NeFT", ["text", "truths"]].tolist() == ["-1.46 [-2.19, -0.73] (1)", "not run"]
    assert table["belief"].tolist() == [belief.sentence for belief in BELIEFS]


def test_sentences_without_results_must_be_written_when_these_arrive() -> None:
    nothing = study_results.compute(REGISTERED, registry.COMPARISONS, EMPTY).results
    lines = "\n".join(belief_differences(FOLDER, REGISTERED, to_csv(nothing)))
    for belief in BELIEFS:
        says_not_run = not set(belief.words.values()) - {"not run", "supported", "not supported"}
        assert (f"{FILE}: {belief.paper}:" in lines) != says_not_run


def test_numbers_and_sentences_of_the_readme_are_compared(tmp_path: Path) -> None:
    text = (FOLDER.parents[1] / "README.md").read_text("utf-8")
    readme = tmp_path / "README.md"
    for before, after in (("", ""), ("-1.46", "-1.45"), (BELIEFS[1].sentence, "It is better.")):
        readme.write_text(text.replace(before, after), "utf-8")
        lines = list(readme_differences(readme, FOLDER, REGISTERED, text_estimates()))
        assert len(lines) == (before != "")
        assert all(before in line for line in lines)


def test_verdicts_of_the_first_edition_are_compared(tmp_path: Path) -> None:
    folder = tmp_path / "evidence-2"
    folder.mkdir()
    (tmp_path / "edition-1").symlink_to(FOLDER.with_name("edition-1"))
    text = '[[belief]]\npaper = "NeFT"\narxiv = "2403.11621"\nsentence = "A."\n'
    (folder / FILE).write_text(f'{text}words = {{ "neft.over_full" = "supported" }}\n', "utf-8")
    results = (FOLDER / "results.csv").read_bytes()
    lines = list(belief_differences(folder, REGISTERED, results))
    assert f"{FILE}: NeFT: neft.over_full is 'not supported', the sentence relies on 'supported'" in lines
