"""The pages of docs/: their Python runs, and what they show of the command line is what it prints.

Of every page the blocks are run in order, in a folder of its own: ``python`` in one namespace, and ``console`` where a
line begins with ``$ lorascope``. Lines below such a command are what it has to print; a line of three dots stands for
any number of lines. Words and whole numbers are compared exactly, decimals to one unit of their last digit: they come
from arithmetic that rounds differently on another processor. Without such lines it only has to end well. A command that
ends in ``; echo $?`` shows its exit code as a last line, as a shell would, and may end in any.
"""

from __future__ import annotations

import re
import shlex
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from lorascope.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in ("smollm2", "many-runs") else ())
    for page in sorted(DOCS.glob("*.md"))
]
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = "; echo $?"
_COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


def fits(printed: str, shown: str) -> bool:
    """Return whether the output is what the page shows, with any lines in place of its three dots."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)]
    pattern = re.sub(r"\d+\\\.\d+", lambda _: r"(\d+\.\d+)", "(?:.*\n)*".join(parts))
    match = re.fullmatch(pattern, printed)
    decimals = re.findall(r"\d+\.\d+", shown)
    return match is not None and all(close(*pair) for pair in zip(match.groups(), decimals, strict=True))


def close(one: str, other: str) -> bool:
    """Return whether two decimals have as many digits and differ by one unit of the last at most."""
    digits = {len(number.partition(".")[2]) for number in (one, other)}
    return len(digits) == 1 and abs(Decimal(one) - Decimal(other)) <= Decimal(1).scaleb(-digits.pop())


def test_three_dots_stand_for_any_lines() -> None:
    assert fits("a\nb\nc\n", "a\n...\nc\n")
    assert fits("a\nc\n", "a\n...\nc\n")
    assert not fits("a\nb\nd\n", "a\n...\nc\n")
    assert not fits("a\nb\n", "a\n")


def test_decimals_fit_to_one_unit_of_the_last_digit() -> None:
    shown = "W_q   3 of 12   9.95  0.0673\n"
    assert fits("W_q   3 of 12   9.96  0.0672\n", shown)
    assert not fits("W_q   3 of 12   9.97  0.0673\n", shown)
    assert not fits("W_q   3 of 12   9.9  0.0673\n", shown)
    assert not fits("W_q   4 of 12   9.95  0.0673\n", shown)
    assert not fits("W_v   3 of 12   9.95  0.0673\n", shown)
    assert fits("a\nW_q 1.5\nb\n", "...\nW_q 1.6\n...\n")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)
            continue
        for command, shown in _COMMAND.findall(block):
            plain = command.removesuffix(_CODE)
            words = shlex.split(plain)
            if words[0] != "lorascope":
                continue
            capsys.readouterr()
            code = main(words[1:])
            printed = capsys.readouterr().out
            if plain == command:
                assert code == 0, command
            else:
                printed += f"{code}\n"
            assert not shown.strip() or fits(printed, shown), f"{page.name}: $ {command}\n{printed}"
