"""``lorascope verify``: green on the repository, red on a page that differs, one line for wrong use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorascope.cli.main import main
from lorascope.evidence import registration

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of pages and data without runs, which the command takes for the repository."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "data", root / "data", ignore=shutil.ignore_patterns("evidence"))
    (root / "docs" / "papers").mkdir(parents=True)
    for page in ("README.md", *(path.relative_to(ROOT) for path in (ROOT / "docs").glob("**/*.md"))):
        if Path(page).parent.name in ("", "docs", "papers"):
            shutil.copy(ROOT / page, root / page)
    monkeypatch.setattr(registration, "FILE", root / "data" / "registered.toml")
    assert main(["verify", "--write"]) == 0
    return root


def test_the_repository_agrees_with_its_evidence_and_needs_no_torch() -> None:
    code = "import sys; from lorascope.cli.main import main; print(main(['verify'])); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("All agrees. "), found.stderr
    assert found.stdout.endswith(" for 88 claims.\n0\n")


def test_without_runs_the_pages_state_that(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "All agrees. No runs are kept yet for 88 claims."
    for page in ("README.md", "docs/findings.md", "docs/papers/lora.md"):
        assert "No runs are kept yet." in (clone / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "block", "old", "new"),
    [
        ("README.md", "primary", "above 0.02 (nats)", "above 0.01 (nats)"),
        ("docs/findings.md", "published", "-0.674", "0.674"),
        ("docs/findings.md", "verdicts", "0 of 24", "24"),
        ("docs/evidence.md", "budget", "88 judged claims", "80 judged claims"),
        ("docs/evidence.md", "before", "-0.08 [-0.09, -0.08]", "0.08 [0.07, 0.09]"),
        ("docs/papers/neft.md", "neft-verdicts", "0.221 [no interval]", "0.221 [0.1, 0.3]"),
        ("docs/papers/neft.md", "neft-printed", "7.167", "9.167"),
    ],
)
def test_a_number_changed_in_a_block_is_named_and_written_again(
    clone: Path, page: str, block: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = clone / page
    content = file.read_text(encoding="utf-8")
    assert old in content
    file.write_text(content.replace(old, new, 1), encoding="utf-8")
    capsys.readouterr()
    assert main(["verify"]) == 1
    number = content[: content.index(old)].count("\n") + 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{file}:{number}: block {block}: kept ")
    kept, _, recomputed = line.partition(", recomputed ")
    assert new in kept
    assert old in recomputed
    assert main(["verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"differences": [line]}
    assert main(["verify", "--write"]) == 0
    assert file.read_text(encoding="utf-8") == content


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
