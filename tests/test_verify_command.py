"""``lorascope verify``: green on the repository, red on data that differ, one line for wrong use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from lorascope.charts.chart import Chart
from lorascope.charts.marks import Point
from lorascope.cli import verify
from lorascope.cli.main import main
from lorascope.files.data_folder import DATA
from lorascope.papers.figures.study_images import StudyFigure
from lorascope.papers.judging import first_edition
from lorascope.papers.study_figures import read_figures


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the first edition's data, which the command verifies alone."""
    shutil.copytree(first_edition.FOLDER.parent / "published", tmp_path / "published")
    folder = Path(shutil.copytree(first_edition.FOLDER, tmp_path / "edition-1"))
    monkeypatch.setattr(first_edition, "FOLDER", folder)
    monkeypatch.setattr(verify, "_verify_second", lambda write, retrain: [])
    monkeypatch.setattr(verify, "clone_root", lambda data: None)
    return folder


def test_the_repository_agrees_with_its_data_and_needs_no_torch() -> None:
    code = "import sys; from lorascope.cli.main import main; print(main(['verify'])); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "No differences.\n0\n", "")


def test_differences_are_lines_or_json_and_the_code_is_1(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first / "earlier.csv").write_text("changed")
    (first / "\x1b[2J.csv").touch()  # a name that would clear the terminal
    lines = [r"edition-1: \x1b[2J.csv: differs from MANIFEST", "edition-1: earlier.csv: differs from MANIFEST"]
    assert main(["verify"]) == 1
    printed = capsys.readouterr()
    assert (printed.err.splitlines(), printed.out) == (lines, "2 differences.\n")
    assert main(["verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"differences": lines}


def test_damaged_runs_are_one_line_each(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first / "runs.csv.gz").write_bytes(b"no archive")
    assert main(["verify"]) == 1
    changed, damaged = capsys.readouterr().err.splitlines()
    assert changed == "edition-1: runs.csv.gz: differs from MANIFEST"
    assert damaged.startswith("edition-1: cannot compute the verdicts: cannot read ")


def test_images_of_other_data_are_lines_or_follow_from_a_cause(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chart = Chart(pd.DataFrame({"x": [1.0], "y": [2.0]}), [Point("x", "y")])
    figures = {name: StudyFigure("LoRA", "A point", chart) for name in "ab"}
    monkeypatch.setattr(verify, "clone_root", lambda data: tmp_path)
    monkeypatch.setattr(verify, "read_figures", lambda data: figures)
    assert main(["verify"]) == 1
    lines = [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["figures/a.png", "figures/b.png"]
    earlier = (first / "earlier.csv").read_bytes()
    (first / "earlier.csv").write_text("changed")
    assert main(["verify"]) == 1
    cause = "edition-1: earlier.csv: differs from MANIFEST"
    assert capsys.readouterr().err.splitlines() == [cause, "2 images in what follows from these"]
    (first / "earlier.csv").write_bytes(earlier)
    assert main(["verify", "--write"]) == 0
    assert main(["verify"]) == 0


def test_figure_of_a_damaged_table_is_named(tmp_path: Path) -> None:
    data = Path(shutil.copytree(DATA, tmp_path / "data"))
    pd.DataFrame({"arm": ["a"], "seed": 200, "run": "r"}).to_parquet(data / "evidence-2" / "norms.parquet")
    with pytest.raises(ValueError, match=r"figures/norms\.png: cannot be drawn: "):
        read_figures(data)


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--retrain", "-1"), "--retrain must be >= 0, got -1"), (("--write",), "--write requires a clone of the")],
)
def test_wrong_use_is_one_line(first: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lorascope: {message}")
