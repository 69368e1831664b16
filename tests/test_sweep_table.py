"""Table of a running sweep, on a terminal and elsewhere."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import select
import sys
import termios
from pathlib import Path

import pytest

from lorascope.experiments.sweep_table import Row, SweepTable, arrange_rows
from lorascope.training.evaluation import Score
from lorascope.training.progress import ProgressFile, progress_bar, read_progress, writing_progress


class Terminal:
    """The other end of a pseudo-terminal, as far as a table needs it."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines, self.screen, self.row, self.column = columns, lines, [""], 0, 0
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (lines, columns))
        self.stream = os.fdopen(slave, "w")

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()
        os.close(self.master)

    def read(self) -> str:
        """Process the output so far, and return it raw."""
        raw = ""
        while select.select([self.master], [], [], 0.05)[0]:
            raw += os.read(self.master, 1 << 16).decode()
        for part in re.findall(r"\033\[\d*[A-Z]|\r|\n|[^\033\r\n]+", raw):
            self._take(part)
        return raw

    def _take(self, part: str) -> None:
        if part == "\r":
            self.column = 0
        elif part == "\n":
            self.row += 1
            self.screen += [""] * (self.row - len(self.screen) + 1)
        elif part.endswith("F") and part[0] == "\033":
            self.row, self.column = self.row - int(part[2:-1]), 0
            assert self.row >= max(0, len(self.screen) - self.lines), "above the screen"
        elif part == "\033[K":
            self.screen[self.row] = self.screen[self.row][: self.column]
        elif part == "\033[J":
            del self.screen[self.row + 1 :]
            self.screen[self.row] = self.screen[self.row][: self.column]
        else:
            assert part[0] != "\033", part
            assert self.column + len(part) < self.columns, "the line is broken"
            line = self.screen[self.row].ljust(self.column)
            self.screen[self.row] = line[: self.column] + part + line[self.column + len(part) :]
            self.column += len(part)


def train_a_little(file: Path, steps: int) -> ProgressFile:
    note = ProgressFile(file)
    with writing_progress(note), progress_bar("search", 9, 2, visible=False) as bar:
        for _ in range(steps):
            bar.show(0.5, None)
        note.write()
        assert read_progress(file)["begun"] > 0
    return note


def test_progress_file_counts_starts_without_an_end(tmp_path):
    file = tmp_path / "0.json"
    assert read_progress(file) == {}
    ProgressFile(file)
    assert ProgressFile(file).content["begun"] == read_progress(file)["begun"] == 2
    train_a_little(file, 3)
    told = read_progress(file)
    assert (told["begun"], told["step"], told["total"]) == (0, 5, 9)
    with progress_bar("outside", 3, 0, visible=False) as bar:
        bar.show(0.5, None)
    assert read_progress(file) == told


def test_rows_show_status_step_and_metric(tmp_path):
    board = SweepTable(["a", "b", "c"], lambda number: tmp_path / f"{number}.json", None)
    train_a_little(tmp_path / "1.json", 1)
    board.end(2, "failed", "ValueError: no")
    assert board.rows() == [Row("a", "waiting"), Row("b", "running", "3/9"), Row("c", "failed", "", "ValueError: no")]


def test_metric_is_shown_with_its_name(tmp_path):
    import numpy as np

    score = Score("accuracy", np.zeros(4), np.ones(4, dtype=int), np.array([True, True, True, False]), None)
    note = ProgressFile(tmp_path / "0.json")
    note.content |= {"total": 9, "step": 0}
    note.show(0.1, score)
    note.write()
    board = SweepTable(["a"], lambda number: tmp_path / f"{number}.json", None)
    assert board.rows() == [Row("a", "running", "1/9", "accuracy 0.75")]


def test_without_a_terminal_a_line_is_written_when_a_run_starts_or_ends(tmp_path):
    stream = io.StringIO()
    with SweepTable(["a", "b"], lambda number: tmp_path / f"{number}.json", stream) as board:
        train_a_little(tmp_path / "0.json", 1)
        board._redraw()
        board._redraw()
        board.end(0, "done", "accuracy 0.5")
    assert stream.getvalue().splitlines() == ["[0/2] running a  3/9", "[1/2] done    a    accuracy 0.5"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_on_a_terminal_the_table_is_redrawn_in_place(columns, tmp_path):
    names = [f"LoRA, rank {8 + number}, targets query key value dense, lr 0.001, seed 0" for number in range(20)]
    reason = "ValueError: targets 'nowhere' matches no module of this model; did you mean 'dense', or all-linear?"
    with Terminal(columns, 12) as terminal:
        with SweepTable(names, lambda number: tmp_path / f"{number}.json", terminal.stream) as board:
            board._redraw()
            first = terminal.read()
            board._redraw()
            assert terminal.read() == ""  # an unchanged table is not redrawn
            train_a_little(tmp_path / "3.json", 2)
            board.end(19, "failed", reason)
            board._redraw()
            second = terminal.read()
            for number in range(19):
                board.end(number, "done", "accuracy 0.8125")
        terminal.read()
    assert "\033[J" not in first[:-3]
    assert "\033[J" not in second[:-3]  # clears only what follows the table
    told = [line for line in terminal.screen if line]
    assert len(told) == len(terminal.screen) - 1 <= 11
    assert sum(line.startswith("run ") for line in told) == 1
    assert [" failed " in line for line in told[1:-2]] == [False] * 7 + [True]
    assert "seed 0" in told[1]
    assert "accuracy 0.8125" in told[1]
    assert told[-1] == "20 runs: 19 done, 0 running, 0 waiting, 1 failed"
    assert reason[:24] in told[-3]


class Closed(io.StringIO):
    """A stream whose reader has closed it."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    flush = write


def test_closed_terminal_does_not_end_training(tmp_path, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("open", 3, 0, visible=True) as bar:
        stream.write = stream.flush = Closed().write
        for _ in range(3):
            bar.last_print_t = 0  # simulates a long step
            bar.show(0.5, None)
    with SweepTable(["a"], lambda number: tmp_path / "none.json", Closed()) as board:
        board.end(0, "done", "accuracy 1")
    assert board.rows() == [Row("a", "done", metric="accuracy 1")]


def test_low_screen_shows_failed_and_running_runs_first():
    rows = [Row(f"run {number}", "done") for number in range(50)]
    rows[7] = Row("run 7", "running", "3/9", "accuracy 0.75")
    rows[30] = Row("run 30", "failed", "", "x" * 200)
    lines = arrange_rows(rows, 80, 8)
    assert len(lines) < 8
    assert max(map(len, lines)) < 80
    assert [line.split()[1] for line in lines[1:-2]] == ["0", "1", "7", "30"]
    assert lines[-2:] == ["... and 46 more", "50 runs: 48 done, 1 running, 0 waiting, 1 failed"]
