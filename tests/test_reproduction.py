"""The command that prints nine rows, trains small versions and one pair again, and writes a page, on tiny runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_study_retraining import CLAIM, CONTROL, LABELS, METHOD, data, folder, run_command  # noqa: F401
from test_study_training import arms, few_texts  # noqa: F401

from lorascope.cli import reproduce as command
from lorascope.files.data_folder import DATA
from lorascope.papers import registry
from lorascope.papers.judging import kept_study, registered_study, study_verification
from lorascope.papers.judging.beliefs import FILE
from lorascope.papers.judging.data_folder import PAPERS, STUDY_RUNS
from lorascope.papers.judging.study_summary import LINE, Summary, read_summary, summary_lines
from lorascope.papers.training import reproduction, small_studies, study_seeds

MAX_LINES = 25
BELIEF = f"""
[[belief]]
paper = "AdaLoRA"
arxiv = "{PAPERS["AdaLoRA"]}"
sentence = "Gains something where ranks are uneven."
words = {{ "{CLAIM}" = "gain" }}
"""


@pytest.fixture
def tiny(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """Return a folder of data with the pair of the tests; motives are in the tests of small studies."""
    monkeypatch.setattr(reproduction, "PAIR", CLAIM)
    monkeypatch.setattr(reproduction, "MOTIVES", ())
    monkeypatch.setattr(small_studies, "COMPARISONS", study_seeds.COMPARISONS)
    (data / "edition-1").symlink_to(DATA / "edition-1")
    return data


@pytest.fixture
def kept(tiny: Path, folder: Path) -> Path:  # noqa: F811
    """Return a folder of data with runs, results and a sentence."""
    study_verification.write_study(folder, registered_study.STUDY_FILE, registry.COMPARISONS)
    (folder / FILE).write_text(BELIEF, encoding="utf-8")
    return tiny


def reproduce(words: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert run_command(*words) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_pair_is_compared_with_the_kept_run(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    lines = reproduce(["-o", tmp_path / "report"], capsys)
    assert lines[0].startswith("lorascope: nine methods, and what holds on small models")
    assert lines[2].startswith("AdaLoRA")
    assert lines[-1] == str(tmp_path / "report" / "report.html")
    evidence = kept_study.read(kept / STUDY_RUNS)
    for label, line in zip(LABELS, lines[-3:-1], strict=True):
        closed = evidence.closed(label, 200)
        assert line.startswith(f"Trained again: {label}, seed 200: kept {closed:.1f}, yours {closed:.1f}, same")
        assert line.endswith(": equal")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    for text in ("what we now believe", "Two motives", "Small version: 1 seed (200)", "It gains."):
        assert text in page


@pytest.mark.slow
def test_without_results_small_versions_are_trained(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = reproduce(["-o", tmp_path / "report"], capsys)
    assert lines[0] == f"No results yet: {tiny / STUDY_RUNS / 'results.csv'} is missing."
    assert [line.endswith("no kept run yet") for line in lines[1:]] == [True, True, False]
    result = json.loads("".join(reproduce(["-o", tmp_path / "report", "--json"], capsys)))
    assert {"report", "papers", "words", "note", "retrained", "runs"} == result.keys()
    # No score of a single short run is shown.
    assert all(run.keys() == {"arm", "seed", "steps", "learned"} for run in result["runs"])
    assert {(run["arm"], run["steps"], run["learned"]) for run in result["runs"]} == {
        (label, 4, "no") for label in LABELS
    }


def test_missing_registration_is_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registered_study.STUDY_FILE.unlink()
    assert run_command("-o", tmp_path / "report") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "registered-2.toml is missing" in line


def test_other_files_are_never_replaced(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    page.write_text("<html>mine</html>", encoding="utf-8")
    assert run_command("-o", tmp_path) == 2
    assert "was not written by lorascope" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "<html>mine</html>"
    assert not (tmp_path / "runs").exists()


def printed(summary: Summary) -> list[str]:
    lines = list(summary_lines(summary))
    assert max(map(len, lines)) <= LINE
    # The command adds two runs and the path of the report.
    assert len(lines) + 3 <= MAX_LINES
    return lines


def test_nine_rows_of_the_kept_results_fit() -> None:
    lines = printed(read_summary(DATA))
    assert [name for name in PAPERS if not any(line.startswith(name) for line in lines)] == []


@pytest.mark.parametrize("words", [1, 12, 25])
def test_long_sentences_and_numbers_are_cut(words: int) -> None:
    row = {"printed": "+10.25", "text": "-10.032 [-10.073, -10.008] nats (1)", "truths": "not learned"}
    table = pd.DataFrame([{"paper": name, **row, "belief": " ".join(["unfortunately"] * words)} for name in PAPERS])
    counts = dict.fromkeys(["not even there", "not only there", "gain below m", "cost below d", "not learned"], 11)
    lines = printed(Summary(table, counts, 863.0))
    assert sum("unfortunately" in line for line in lines) >= len(PAPERS)


@pytest.mark.parametrize("word", ["no headroom", ""])
def test_number_without_headroom_is_left_to_the_report(word: str) -> None:
    text = ", ".join(filter(None, ["-0.10 [-0.67, 0.46]", word])) + " (1)"
    row = {"paper": "AdaLoRA", "printed": "+0.81", "text": text, "truths": "not run", "belief": "Not known."}
    line = printed(Summary(pd.DataFrame([row]), {"not run": 1}, 1.0))[2]
    assert ("-0.10" in line) == (word == "")
    assert word in line


def test_damaged_results_are_one_line(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kept / STUDY_RUNS / "results.csv").write_text("claim,n\n", encoding="utf-8")
    capsys.readouterr()
    assert run_command() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot read" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--claim", "pair.lora"), "--claim requires --seed"),
        (("--claim", "pair.lara", "--seed", "3"), "unknown claim 'pair.lara'; did you mean 'pair.lora'"),
        (("--seed", "-1"), "--seed must be from 0"),
        (("--seed", "3"), "--seed requires --paper or --claim"),
        (("--evidence", "x", "--seed", "1"), "--seed requires"),
        (("--minutes", "3"), "--minutes requires --evidence"),
        (("--minutes", "nan", "--evidence", "x"), "--minutes must be >= 0, got nan"),
        (("--minutes", "-1", "--evidence", "x"), "--minutes must be >= 0, got -1"),
        (("--quick",), "--quick"),
    ],
)
def test_wrong_arguments_give_one_line(words: tuple[str, ...], message: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(command.os, "environ", command.os.environ.copy())
    assert run_command(*words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_report_opens_only_on_a_terminal_with_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(command.os, "environ", {"DISPLAY": ":0"})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert command._has_screen()
    monkeypatch.setattr(command.os, "environ", {})
    assert not command._has_screen()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert command._has_screen()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not command._has_screen()
