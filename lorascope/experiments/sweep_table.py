"""Table of a running sweep: status, step and metric of every run, read from the progress files."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lorascope.files.printable import printable
from lorascope.files.text_layout import elide
from lorascope.training.progress import read_progress

# Seconds between two reads of the progress files.
_PAUSE = 1.0
# Columns reserved for status, step and metric, and the minimum width of a name.
_OTHER_COLUMNS, _NAME = 42, 16
# Order of importance on a screen with too few lines for all runs.
_URGENT = ("failed", "running", "waiting", "done")
# Seconds before the time left is estimated.
_FIRST_ESTIMATE = 5.0


class Row(NamedTuple):
    """One run in the table of a sweep."""

    name: str
    status: str
    step: str = ""
    metric: str = ""


class SweepTable:
    """Table of a sweep on a terminal, redrawn every second; elsewhere one line whenever a run starts or ends.

    ``note`` returns the progress file of the run with a number; the stream None shows no table.
    """

    def __init__(self, names: Sequence[str], note: Callable[[int], Path], stream: Any) -> None:
        self.names, self.note, self.stream = list(map(printable, names)), note, stream
        self._begun = time.monotonic()
        self._ended: dict[int, Row] = {}
        self._told = ["waiting"] * len(names)
        self._shown: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._redraw_until_over, daemon=True)

    def __enter__(self) -> SweepTable:
        if self.stream is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.stream is not None:
            self._thread.join()
            self._redraw()

    def end(self, number: int, status: str, metric: str) -> None:
        """Mark a run as done or failed."""
        self._ended[number] = Row(self.names[number], status, metric=printable(metric))

    def rows(self) -> list[Row]:
        """Return the current rows of all runs."""
        return list(map(self._current_row, range(len(self.names))))

    def _current_row(self, number: int) -> Row:
        """Return the row of a run, from its progress file until it ends."""
        if number in self._ended:
            return self._ended[number]
        note = read_progress(self.note(number))
        if not note:
            return Row(self.names[number], "waiting")
        step = f"{note['step']}/{note['total']}" if "step" in note else ""
        metric = f"{note['metric_name']} {note['metric']:.4g}" if "metric" in note else ""
        return Row(self.names[number], "running", step, metric)

    def time_left(self, rows: Sequence[Row]) -> str:
        """Format the estimated time until all runs have ended; "" without an estimate."""
        elapsed = time.monotonic() - self._begun
        finished = sum(map(_finished_part, rows)) / len(rows)
        if elapsed < _FIRST_ESTIMATE or not 0 < finished < 1:
            return ""
        return f"about {math.ceil(elapsed * (1 / finished - 1) / 60)} min left"

    def _redraw_until_over(self) -> None:
        while not self._over.wait(_PAUSE):
            self._redraw()

    def _redraw(self) -> None:
        rows = self.rows()
        with suppress(OSError):  # a closed terminal must not end the runs
            left = self.time_left(rows)
            if self.stream.isatty():
                self._paint(rows, left)
            else:
                statuses = [row.status for row in rows]
                done = statuses.count("done")
                for row, status in zip(rows, self._told, strict=True):
                    if row.status != status:
                        line = f"[{done}/{len(rows)}] {row.status:<8}{row.name}  {row.step}  {row.metric}"
                        self.stream.write(f"{line.rstrip()}{left and f'  ({left})'}\n")
                self._told = statuses
            self.stream.flush()

    def _paint(self, rows: Sequence[Row], left: str) -> None:
        """Draw over the last table line by line in one write, since clearing the screen first flickers."""
        columns, lines = os.get_terminal_size(self.stream.fileno())
        columns, lines = columns or 80, lines or 24  # some terminals report the size 0
        lines_of_table = arrange_rows(rows, columns, lines, left)
        if lines_of_table == self._shown:
            return
        # A terminal that became narrower has wrapped the long lines of the last table.
        height = sum(max(1, -(-len(line) // columns)) for line in self._shown)
        text = "".join(f"{line}\033[K\n" for line in lines_of_table) + "\033[J"
        if height:
            text = f"\033[{height}F{text}"
        self.stream.write(text)
        self._shown = lines_of_table


def _finished_part(row: Row) -> float:
    if row.status in ("done", "failed"):
        return 1.0
    if not row.step:
        return 0.0
    step, _, total = row.step.partition("/")
    return int(step) / int(total)


def arrange_rows(rows: Sequence[Row], columns: int, lines: int, left: str = "") -> list[str]:
    """Format the table of a sweep in fewer than ``columns`` and ``lines``; the least urgent may only be counted."""
    count = Counter(row.status for row in rows)
    totals = ", ".join(f"{count[status]} {status}" for status in ("done", "running", "waiting", "failed"))
    room = max(1, lines - 4)
    # Select by importance, then show in the order of the runs.
    numbers = sorted(range(len(rows)), key=lambda number: _URGENT.index(rows[number].status))[:room]
    shown_rows = [rows[number] for number in sorted(numbers)]
    width = min(max(len(row.name) for row in shown_rows), max(_NAME, columns - _OTHER_COLUMNS))
    text = [_format_row("run", "status", "step", "metric", width), *(_format_row(*row, width) for row in shown_rows)]
    if len(shown_rows) < len(rows):
        text.append(f"... and {len(rows) - len(shown_rows)} more")
    text.append(f"{len(rows)} runs: {totals}{left and f'; {left}'}")
    return [_shorten(line, columns - 1) for line in text]


def _shorten(line: str, width: int) -> str:
    """Cut a line to a width, with two dots at its end."""
    if len(line) <= width:
        return line
    return f"{line[: max(width - 2, 0)]}.."[:width]


def _format_row(name: str, status: str, step: str, metric: str, width: int) -> str:
    """Format one run; the reason of a failure also uses the room of the step."""
    details = f"{step:<10} {metric}"
    if status == "failed":
        details = metric
    return f"{elide(name, width):<{width}}  {status:<8} {details}".rstrip()
