"""The table that a sweep shows while it runs: every run, its status, step and metric, read from the runs' notes."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lorascope.diagnosis.terminal import elide
from lorascope.files.printable import printable
from lorascope.training.progress import read_progress

# Seconds between two looks at the notes.
_PAUSE = 1.0
# Columns that a name leaves to status, step and metric, and those that are its own even so.
_REST, _NAME = 42, 16
# What is worth a line on a screen that is too low for all runs.
_URGENT = ("failed", "running", "waiting", "done")


class Row(NamedTuple):
    """What is told of one run."""

    name: str
    status: str
    step: str = ""
    metric: str = ""


class SweepTable:
    """A table on a terminal that is drawn anew every second; elsewhere a line whenever a run begins or ends.

    Parameters
    ----------
    names : sequence of str
        The runs.
    note : callable
        The file of a run's note, by its number.
    stream : text stream or None
        None shows nothing.
    """

    def __init__(self, names: Sequence[str], note: Callable[[int], Path], stream: Any) -> None:
        self.names, self.note, self.stream = list(map(printable, names)), note, stream
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
        """A run is done, or has failed."""
        self._ended[number] = Row(self.names[number], status, metric=printable(metric))

    def rows(self) -> list[Row]:
        """All runs as they are now."""
        return [self._ended.get(number) or self._read_row(number) for number in range(len(self.names))]

    def _read_row(self, number: int) -> Row:
        note = read_progress(self.note(number))
        if not note:
            return Row(self.names[number], "waiting")
        step = f"{note['step']}/{note['total']}" if "step" in note else ""
        metric = f"{note['metric_name']} {note['metric']:.4g}" if "metric" in note else ""
        return Row(self.names[number], "running", step, metric)

    def _redraw_until_over(self) -> None:
        while not self._over.wait(_PAUSE):
            self._redraw()

    def _redraw(self) -> None:
        with suppress(OSError):  # a terminal that is closed ends no run
            self._write()

    def _write(self) -> None:
        stream, rows = self.stream, self.rows()
        if stream.isatty():
            self._paint(rows)
        else:
            count = Counter(row.status for row in rows)
            for number, row in enumerate(rows):
                if row.status != self._told[number]:
                    told = f"[{count['done']}/{len(rows)}] {row.status:<8}{row.name}  {row.step}  {row.metric}"
                    stream.write(told.rstrip() + "\n")
            self._told = [row.status for row in rows]
        stream.flush()

    def _paint(self, rows: Sequence[Row]) -> None:
        """Draw over the last table, line by line and in one piece: a screen that is wiped first flickers."""
        columns, lines = os.get_terminal_size(self.stream.fileno())
        columns, lines = columns or 80, lines or 24  # a terminal that does not know its size
        told = table(rows, columns, lines)
        if told == self._shown:
            return
        # A terminal that was made narrower since has broken the long lines of the last table.
        height = sum(max(1, -(-len(line) // columns)) for line in self._shown)
        back = f"\033[{height}F" if height else ""
        self.stream.write(back + "".join(f"{line}\033[K\n" for line in told) + "\033[J")
        self._shown = told


def table(rows: Sequence[Row], columns: int, lines: int) -> list[str]:
    """The table in less than so many columns and lines; runs that need no look are only counted where it is full."""
    count = Counter(row.status for row in rows)
    counted = ", ".join(f"{count[status]} {status}" for status in ("done", "running", "waiting", "failed"))
    room = max(1, lines - 4)
    chosen = sorted(range(len(rows)), key=lambda number: _URGENT.index(rows[number].status))[:room]
    shown = [rows[number] for number in sorted(chosen)]
    width = min(max(len(row.name) for row in shown), max(_NAME, columns - _REST))
    told = [_format_row("run", "status", "step", "metric", width), *(_format_row(*row, width) for row in shown)]
    if len(shown) < len(rows):
        told.append(f"... and {len(rows) - len(shown)} more")
    told.append(f"{len(rows)} runs: {counted}")
    return [line if len(line) < columns else f"{line[: max(columns - 3, 0)]}.."[: columns - 1] for line in told]


def _format_row(name: str, status: str, step: str, metric: str, width: int) -> str:
    """One run; the reason of a failure takes the room of the step too."""
    rest = metric if status == "failed" else f"{step:<10} {metric}"
    return f"{elide(name, width):<{width}}  {status:<8} {rest}".rstrip()
