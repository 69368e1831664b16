"""``lorascope verify``: green on the repository, red on evidence that differs, one line for wrong use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lorascope.cli.main import main
from lorascope.cli.verify import _causes_first
from lorascope.papers.judging import registration

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the data without runs, which the command takes for the repository."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "data", root / "data", ignore=shutil.ignore_patterns("evidence"))
    (root / "README.md").touch()  # a clone has one, a wheel does not
    monkeypatch.setattr(registration, "FILE", root / "data" / "registered.toml")
    assert main(["verify", "--write"]) == 0
    return root


def test_the_repository_agrees_with_its_evidence_and_needs_no_torch() -> None:
    code = "import sys; from lorascope.cli.main import main; print(main(['verify'])); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("No differences. "), found.stderr
    assert found.stdout.endswith(" for 88 claims.\n0\n")


def test_damaged_runs_are_a_difference(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clone / "data" / "evidence"
    folder.mkdir()
    (folder / "runs.csv").write_text("run\n")
    for words in ([], [str(folder)], ["--write"]):
        capsys.readouterr()
        assert main(["verify", *words]) == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"cannot read {folder / 'runs.csv'}: its columns differ")


@pytest.mark.slow
def test_derived_files_are_written_again_but_changed_runs_stay_named(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clone / "data" / "evidence"
    shutil.copytree(ROOT / "data" / "evidence", folder)
    (clone / "figures").mkdir()
    for figure in (folder / "figures").glob("*.parquet"):
        shutil.copy(ROOT / "figures" / f"{figure.stem}.png", clone / "figures")
    assert main(["verify"]) == 0
    file, run = folder / "verdicts.csv", next(folder.glob("predictions/*.npz"))
    original = file.read_bytes(), (folder / "MANIFEST").read_bytes()
    file.write_bytes(
        original[0].replace(b"lora.words,secondary,superiority,0.02", b"lora.words,secondary,superiority,0.03")
    )
    capsys.readouterr()
    assert main(["verify"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["verdicts.csv: row 3 (lora.words secondary): bound: kept '0.03', recomputed '0.02'"]
    assert lines[0].startswith("MANIFEST: verdicts.csv: kept ")
    assert main(["verify", "--write"]) == 0
    assert original == (file.read_bytes(), (folder / "MANIFEST").read_bytes())
    with run.open("ab") as stream:
        stream.write(b"0")
    capsys.readouterr()
    assert main(["verify", "--write"]) == 1
    assert f"MANIFEST: predictions/{run.name}: kept" in capsys.readouterr().err
    (folder / "MANIFEST").unlink()
    assert main(["verify", "--write"]) == 0


def test_values_and_verdicts_that_follow_are_counted() -> None:
    rows = [f"values.csv: row {row} (a.b 10{row}): {column}: kept '1'" for row in (2, 3) for column in ("p", "n")]
    rows += ["verdicts.csv: row 2 (a.b secondary): n: kept '1'"]
    cause = "runs.csv: r: test_metric: kept 0.9, recomputed 0.8"
    assert _causes_first([*rows, cause]) == [
        cause,
        "and 2 values, 1 verdict in what follows from these (--json lists them)",
    ]
    edited = "MANIFEST: verdicts.csv: kept 1, recomputed 2"
    assert _causes_first([edited, rows[-1]]) == [edited, rows[-1]]
    assert _causes_first(rows) == rows


def test_figures_and_values_of_removed_runs_that_follow_are_counted() -> None:
    """Unless nothing else differs."""
    values = "values.csv: kept 453 rows and 10 columns, recomputed 418 rows and 10 columns"
    figures = [f"figures/{name}.png: data_sha256: kept 1, recomputed 2" for name in "ab"]
    cause = "MANIFEST: runs.csv: kept 1, recomputed 2"
    assert _causes_first([values, *figures, cause]) == [
        cause,
        "and 35 values, 2 figures in what follows from these (--json lists them)",
    ]
    assert _causes_first(figures) == figures


def test_folder_without_evidence_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"lorascope: no evidence at {tmp_path}: it has no runs.csv\n"


def test_pages_are_not_written_from_another_folder(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = clone / "other"
    other.mkdir()
    (other / "runs.csv").write_text("run\n")
    capsys.readouterr()
    assert main(["verify", str(other), "--write"]) == 2
    assert "--write requires the evidence of the repository" in capsys.readouterr().err


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def sparse(file: Path) -> None:
    with file.open("ab") as stream:
        stream.truncate(20 * 10**9)


def bomb(file: Path) -> None:
    np.savez_compressed(file, margin=np.zeros(5 * 10**6))


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("runs.csv", fifo, "not a regular file"),
        ("runs.csv", sparse, "file size must be <= "),
        ("predictions/{run}.npz", sparse, "file size must be <= "),
        ("predictions/{run}.npz", bomb, "its arrays must have <= "),
        ("notes.bin", sparse, "file size must be <= "),
        ("\x1b[2J.bin", sparse, r"\\x1b\[2J.bin: file size must be <= "),
        ("\x1b[2J.bin", Path.touch, r"MANIFEST: \\x1b\[2J.bin"),
    ],
)
def test_hostile_file_of_a_foreign_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "evidence"
    folder.mkdir()
    runs = (ROOT / "data/evidence/runs.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "runs.csv").write_text("".join(runs[:2]), encoding="utf-8")
    (folder / "predictions").mkdir()
    spoil(folder / name.format(run=runs[1].partition(",")[0]))
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any(re.search(reason, line) for line in lines), lines
    assert "\x1b" not in "".join(lines)
