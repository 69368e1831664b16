"""The table of a sweep while it runs: what it tells, on a terminal and elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

from lorascope.board import Board, Row, table
from lorascope.evaluation import Score
from lorascope.progress import Note, noted, progress_bar, read_note


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train_a_little(file: Path, steps: int) -> Note:
    note = Note(file)
    with noted(note), progress_bar("search", 9, 2, visible=False) as bar:
        for _ in range(steps):
            bar.show(0.5, None)
        note.write()
        assert read_note(file)["begun"] > 0
    return note


def test_a_note_counts_beginnings_without_an_end(tmp_path):
    file = tmp_path / "0.json"
    assert read_note(file) == {}
    Note(file)
    assert Note(file).told["begun"] == read_note(file)["begun"] == 2
    train_a_little(file, 3)
    told = read_note(file)
    assert (told["begun"], told["step"], told["total"], told["phase"]) == (0, 5, 9, "search")
    with progress_bar("outside", 3, 0, visible=False) as bar:
        bar.show(0.5, None)
    assert read_note(file) == told


def test_rows_tell_status_step_and_metric(tmp_path):
    board = Board(["a", "b", "c"], lambda number: tmp_path / f"{number}.json", None)
    train_a_little(tmp_path / "1.json", 1)
    board.end(2, "failed", "ValueError: no")
    assert board.rows() == [Row("a", "waiting"), Row("b", "running", "3/9"), Row("c", "failed", "", "ValueError: no")]


def test_a_metric_is_named(tmp_path):
    import numpy as np

    score = Score("accuracy", np.zeros(4), np.ones(4, dtype=int), np.array([True, True, True, False]), None)
    note = Note(tmp_path / "0.json")
    note.phase("lora", 9, 0)
    note.show(0.1, score)
    note.write()
    board = Board(["a"], lambda number: tmp_path / f"{number}.json", None)
    assert board.rows() == [Row("a", "running", "1/9", "accuracy 0.75")]


def test_elsewhere_a_line_whenever_a_run_begins_or_ends(tmp_path):
    stream = io.StringIO()
    with Board(["a", "b"], lambda number: tmp_path / f"{number}.json", stream) as board:
        train_a_little(tmp_path / "0.json", 1)
        board._draw()
        board._draw()
        board.end(0, "done", "accuracy 0.5")
    assert stream.getvalue().splitlines() == ["[0/2] running a  3/9", "[1/2] done    a    accuracy 0.5"]


def test_on_a_terminal_the_table_is_drawn_over_itself(tmp_path):
    stream = Terminal()
    with Board(["a", "b"], lambda number: tmp_path / f"{number}.json", stream) as board:
        board._draw()
    first, second = stream.getvalue().split("\033[4F\033[J")
    assert first == second
    assert second.splitlines()[-1] == "2 runs: 0 done, 0 running, 2 waiting, 0 failed"


def test_a_low_screen_shows_what_needs_a_look():
    rows = [Row(f"run {number}", "done") for number in range(50)]
    rows[7] = Row("run 7", "running", "3/9", "accuracy 0.75")
    rows[30] = Row("run 30", "failed", "", "x" * 200)
    lines = table(rows, 80, 8)
    assert len(lines) < 8
    assert max(map(len, lines)) < 80
    assert [line.split()[1] for line in lines[1:-2]] == ["0", "1", "7", "30"]
    assert lines[-2:] == ["... and 46 more", "50 runs: 48 done, 1 running, 0 waiting, 1 failed"]
