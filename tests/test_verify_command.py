"""``lorascope verify``: green on the repository, red on a page that differs, one line for wrong use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorascope.cli.main import main
from lorascope.evidence import blocks, pages, registration

ROOT = Path(__file__).parents[1]


def test_pages_agree_with_the_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    assert capsys.readouterr().out == "All agrees. No runs are kept yet for the 88 registered claims.\n"
    assert main(["verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"differences": []}


def test_a_number_changed_on_a_page_is_named(tmp_path: Path) -> None:
    texts = blocks.all_blocks(registration.read(), ROOT / "data")
    page = tmp_path / "findings.md"
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert "-0.674 [-1.27, -0.074]" in text
    page.write_text(text.replace("-0.674", "0.669"), encoding="utf-8")
    (line,) = pages.differences(page, texts)
    assert "block published, line 4: kept" in line
    assert "-0.674" in line
    pages.write(page, texts)
    assert page.read_text(encoding="utf-8") == text


def test_verification_needs_no_torch() -> None:
    code = "import sys; from lorascope.cli.main import main; main(['verify']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_folder_without_evidence_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"lorascope: no evidence at {tmp_path}: it has no runs.csv\n"
