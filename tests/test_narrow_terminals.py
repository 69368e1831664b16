"""Output on narrow terminals and terminals of unknown size: it neither hangs nor is too wide."""

from __future__ import annotations

import os
import pty
import signal
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorascope.cli.main import COMMANDS, main
from lorascope.experiments.sweep_table import Row, SweepTable, arrange_rows
from lorascope.files.text_layout import elide
from lorascope.training.progress import progress_bar

WIDTHS = (0, 1, 2, 3, 10)
ROWS = [Row("lora-with-a-long-name", "running", "3/9", "accuracy 0.5"), Row("b", "failed", metric="ValueError: " * 9)]


@pytest.fixture
def limited() -> Iterator[None]:
    """Raise an error in a test that hangs."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("hung")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("columns", WIDTHS)
def test_help_on_a_narrow_terminal_is_complete(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in ([name, "--help"] for name in ("inspect", "export")):
        assert main(words) == 0
        assert "--json" in capsys.readouterr().out
    assert main(["plot"]) == 0
    assert main([]) == 2
    assert all(f"  {name} " in capsys.readouterr().out for name in list(COMMANDS)[:1])
    assert main(["inspect", "--jsn"]) == 2
    assert "--jsn" in capsys.readouterr().err
    assert os.environ["COLUMNS"] == str(columns)


@pytest.mark.parametrize("columns", range(1, 60))
def test_sweep_table_is_narrower_than_its_terminal(columns: int) -> None:
    for lines in (1, 2, 24):
        assert all(len(line) < columns for line in arrange_rows(ROWS, columns, lines))


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("columns", WIDTHS)
def test_sweep_table_is_printed_on_any_terminal(columns: int) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (columns, columns))
    with os.fdopen(slave, "w") as stream:
        board = SweepTable([row.name for row in ROWS], lambda number: Path("nowhere"), stream)
        board._redraw()
        board.end(1, "failed", "x")
        board._redraw()
        stream.flush()
        assert os.read(master, 1 << 16)
    os.close(master)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("columns", WIDTHS)
def test_progress_bar_is_printed_on_any_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress_bar("phase", 3, 0, visible=True) as bar:
        for _ in range(3):
            bar.show(1.0, None)


@pytest.mark.parametrize("width", range(-1, 12))
def test_elide_is_at_most_as_wide_as_requested(width: int) -> None:
    for text in ("", "a", "abcdefghijklmnop"):
        shown = elide(text, width)
        assert len(shown) <= max(width, 0)
        assert shown == text or len(shown) == max(width, 0)
