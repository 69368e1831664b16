"""Blocks of README and docs: written from the evidence, red on a page that differs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import write_pages

from lorascope.papers.judging import registration

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Copy of pages and data without runs, whose blocks are written."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "data", root / "data", ignore=shutil.ignore_patterns("evidence"))
    (root / "docs" / "papers").mkdir(parents=True)
    for page in write_pages.pages(ROOT):
        shutil.copy(page, root / page.relative_to(ROOT))
    assert write_pages.main([], root) == 0
    return root


def test_pages_of_the_repository_agree_with_its_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_pages.main(["--check"]) == 0, capsys.readouterr().err


def test_without_runs_the_pages_state_that(clone: Path) -> None:
    assert write_pages.main(["--check"], clone) == 0
    for page in ("README.md", "docs/findings.md", "docs/papers/lora.md"):
        assert "No runs are kept yet." in (clone / page).read_text(encoding="utf-8")


NUMBERS = [
    ("README.md", "primary", "above 0.02 (nats)", "above 0.01 (nats)"),
    ("docs/findings.md", "published", "-0.674", "0.674"),
    ("docs/findings.md", "verdicts", "0 of 24", "24"),
    ("docs/evidence.md", "budget", "88 claims on runs", "80 judged claims"),
    ("docs/evidence.md", "before", "-0.08 [-0.09, -0.08]", "0.08 [0.07, 0.09]"),
    ("docs/papers/neft.md", "neft-printed", "7.167", "9.167"),
    ("docs/papers/neft.md", "neft-verdicts", "0.221 [no interval]", "0.221 [0.1, 0.3]"),
]
"""Page, block, a number of it, and another one."""


def test_numbers_changed_in_blocks_are_named_and_written_again(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, places = {page: (clone / page).read_text(encoding="utf-8") for page, *_ in NUMBERS}, []
    for page, block, old, new in NUMBERS:
        content = (clone / page).read_text(encoding="utf-8")
        assert content.count(old)
        (clone / page).write_text(content.replace(old, new, 1), encoding="utf-8")
        places.append(f"{clone / page}:{content[: content.index(old)].count(chr(10)) + 1}: block {block}: kept ")
    capsys.readouterr()
    assert write_pages.main(["--check"], clone) == 1
    lines = capsys.readouterr().err.splitlines()
    for place, (_, _, old, new) in zip(places, NUMBERS, strict=True):
        (line,) = [line for line in lines if line.startswith(place)]
        kept, _, recomputed = line.partition(", recomputed ")
        assert new in kept
        assert old in recomputed
    assert len(lines) == len(NUMBERS)
    assert write_pages.main([], clone) == 0
    assert original == {page: (clone / page).read_text(encoding="utf-8") for page in original}


def test_measured_number_in_the_text_is_named(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = clone / "docs" / "papers" / "fourierft.md"
    content = page.read_text(encoding="utf-8")
    page.write_text(content.replace("## Scope", "The logs differ by 0.674 points.\n\n## Scope", 1), encoding="utf-8")
    capsys.readouterr()
    assert write_pages.main(["--check"], clone) == 1
    line = content[: content.index("## Scope")].count("\n") + 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(
        f"{page}:{line}: 0.674 is a measured number outside a block (published.fourierft: effect): "
    )


def test_deleted_pages_are_named(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for page, block in ("README.md", "primary"), ("docs/papers/lisa.md", "lisa-verdicts"):
        (clone / page).unlink()
        capsys.readouterr()
        assert write_pages.main(["--check"], clone) == 1
        assert f"README.md or docs: block {block!r} is missing" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("README.md", b"\xff", "README.md: 'utf-8' codec can't decode"),
        (
            "data/published/autolora_lists.csv",
            b"list,judged,sd\na,True,x\n",
            "published: cannot compute published.autolora",
        ),
        ("data/published/printed_gains.csv", b"", "published: cannot compute published.hydralora"),
        ("data/registered.toml", b"[[claim", "registered.toml: "),
        (
            "data/registered.toml",
            registration.FILE.read_bytes().replace(b'tier = "primary"', b'tier = "secondary"', 1),
            "registered.toml: LoRA must have one primary claim, got 0",
        ),
    ],
)
def test_damaged_file_that_pages_are_written_from_is_a_difference(
    clone: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, message: str
) -> None:
    (clone / file).write_bytes(content)
    capsys.readouterr()
    assert write_pages.main(["--check"], clone) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
