"""The registration compared with its versions at the commits of the runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lorascope.papers.judging import registration
from lorascope.papers.judging.registration import HistoryComparison, compare_with_history

DEVIATION = """
[[deviation]]
claim = "{claim}"
what = {{ what = "the margin", why = "a slip"{arms} }}
"""


@pytest.fixture
def clone(tmp_path: Path) -> tuple[Path, str]:
    """Return the registration of this repository in a new one, and its commit."""
    file = tmp_path / "data" / "registered.toml"
    file.parent.mkdir()
    file.write_bytes(registration.FILE.read_bytes())
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "register"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    return file, head


def differences(file: Path, commits: list[str]) -> list[str]:
    return compare_with_history(file, commits).differences


def edit(file: Path, old: str, new: str, after: str = "") -> None:
    text = file.read_text(encoding="utf-8")
    start = text.index(after)
    assert old in text[start:]
    file.write_text(text[:start] + text[start:].replace(old, new, 1), encoding="utf-8")


def append(file: Path, claim: str, arms: str = "") -> None:
    file.write_text(file.read_text(encoding="utf-8") + DEVIATION.format(claim=claim, arms=arms), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda file: edit(file, "id =", "# a comment\nid =", "[[claim]]"), ""),
        (
            lambda file: edit(file, 'sentence = "', 'sentence = "Perhaps ', 'id = "lora.lowdata"'),
            "claim lora.lowdata: ",
        ),
        (lambda file: edit(file, "margin = 0.", "margin = 0.1", 'id = "lora.lowdata"'), "claim lora.lowdata: "),
        (lambda file: edit(file, "first_seed = 100", "first_seed = 105", 'id = "lisa.blocks"'), "claim lisa.blocks: "),
        (lambda file: edit(file, "looks = [1, 2]", "looks = [1]"), "stages: "),
        (
            lambda file: edit(file, "rates = [0.0003", "rates = [0.0004", 'label = "LoRA, rank 8"'),
            "arm 'LoRA, rank 8': ",
        ),
        (lambda file: edit(file, "[[deviation]]\nclaim = ", "[[deviation]]\nclaim = 'x' #"), "deviation of "),
    ],
)
def test_change_since_the_runs_is_named(clone: tuple[Path, str], change: Callable[[Path], None], line: str) -> None:
    file, commit = clone
    assert differences(file, [commit]) == []
    change(file)
    lines = differences(file, ["0" * 40, commit])
    assert len(lines) == bool(line)
    assert all(found.startswith(f"registered.toml: {line}") for found in lines)


def test_a_later_deviation_allows_a_change_of_its_claim(clone: tuple[Path, str]) -> None:
    file, commit = clone
    edit(file, "margin = 0.", "margin = 0.1", 'id = "lora.lowdata"')
    append(file, "lora.words")
    assert len(differences(file, [commit])) == 1
    append(file, "lora.lowdata")
    assert differences(file, [commit]) == []


def test_a_deviation_of_before_the_runs_allows_nothing(clone: tuple[Path, str]) -> None:
    file, commit = clone
    known = next(each.claim for each in registration.read(file).deviations if each.claim != "*")
    edit(file, 'sentence = "', 'sentence = "Perhaps ', f'id = "{known}"')
    (line,) = differences(file, [commit])
    assert line.startswith(f"registered.toml: claim {known}: differs from commit {commit[:12]}")


def test_an_arm_may_change_with_a_deviation_of_a_claim_that_uses_it(clone: tuple[Path, str]) -> None:
    file, commit = clone
    edit(file, "rates = [0.0003", "rates = [0.0004", 'label = "LoRA, rank 8"')
    append(file, "autolora.spread", ', arms = { "LoRA, rank 8" = ["sha256:a", "sha256:b"] }')
    assert len(differences(file, [commit])) == 1
    append(file, "lora.parity")
    assert differences(file, [commit]) == []


def test_a_new_arm_needs_no_deviation_if_no_claim_uses_it(clone: tuple[Path, str]) -> None:
    file, commit = clone
    edit(file, "[[claim]]", '[[arm]]\nlabel = "new"\nhash = "sha256:a"\nseeds = 3\n\n[[claim]]')
    assert differences(file, [commit]) == []
    git = ["git", "-C", str(file.parents[1]), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-qam", "add an arm"], check=True)
    later = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    edit(file, "sha256:a", "sha256:b", 'label = "new"')  # its runs have been trained since
    (line,) = differences(file, [commit, later])
    assert line.startswith(f"registered.toml: arm 'new': differs from commit {later[:12]}")


def test_commits_that_are_not_known_are_counted(clone: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    file, commit = clone
    output = file.parents[1] / "written"
    # Neither an option nor a branch is passed on to git.
    assert compare_with_history(file, [commit, "0" * 40, "HEAD", f"--output={output}"]) == HistoryComparison([], 1, 4)
    assert not list(file.parents[1].glob("written*"))
    monkeypatch.setenv("PATH", "")
    assert compare_with_history(file, [commit]) == HistoryComparison([], 0, 1)


def test_an_earlier_version_that_cannot_be_read_is_one_line(clone: tuple[Path, str]) -> None:
    file, _ = clone
    content = file.read_bytes()
    file.write_text("{")
    git = ["git", "-C", str(file.parents[1]), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-qam", "break"], check=True)
    broken = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    file.write_bytes(content)
    (line,) = differences(file, [broken])
    assert line.startswith(f"cannot read registered.toml at commit {broken[:12]}: ")
