"""What a person sees of a long piece of work, and how they stop it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

from lorascope.files.printable import printable
from lorascope.files.typed_json import read_json
from lorascope.training.evaluation import Score

# Seconds between two writings of a note.
_PAUSE = 1.0


class ProgressBar(tqdm):
    """A bar that shows the latest loss and the latest validation metric."""

    shown: dict[str, str]

    def display(self, *args: Any, **kwargs: Any) -> None:
        """Draw; a bar whose terminal is closed is disabled."""
        try:
            super().display(*args, **kwargs)
        except OSError:
            self.disable = True

    def close(self) -> None:
        """End the bar."""
        with suppress(OSError):
            super().close()

    def show(self, loss: float, score: Score | None) -> None:
        """One step further."""
        self.shown["loss"] = f"{loss:.3f}"
        if score is not None:
            self.shown[score.name] = f"{score.metric:.3f}"
        self.set_postfix(self.shown, refresh=False)
        self.update()


class ProgressFile:
    """A small file that says how far a run is, for a process that watches; rewritten once a second at most.

    It also says how often the run was begun without an end, which tells the runs that kill their process.

    Parameters
    ----------
    file : path
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.told: dict[str, Any] = {"begun": read_progress(file).get("begun", 0) + 1}
        self._written = 0.0
        self.write()

    def write(self) -> None:
        """Write what there is to tell; a watcher that has gone takes nothing amiss."""
        self._written = time.monotonic()
        draft = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        with suppress(OSError):
            draft.write_text(json.dumps(self.told), encoding="utf-8")
            draft.replace(self.file)

    def phase(self, name: str, total: int, start: int) -> None:
        """A phase begins, or goes on after ``start`` steps."""
        self.told |= {"phase": name, "total": total, "step": start}
        self.write()

    def __enter__(self) -> ProgressFile:
        return self

    def __exit__(self, *error: object) -> None:
        """A phase ends; what it told last is written with what comes next."""

    def show(self, loss: float, score: Score | None) -> None:
        """One step further."""
        self.told |= {"step": self.told["step"] + 1, "loss": loss}
        if score is not None:
            self.told |= {"metric": score.metric, "metric_name": score.name}
        if time.monotonic() - self._written > _PAUSE:
            self.write()


def read_progress(file: Path) -> dict[str, Any]:
    """What a note says; nothing where there is none."""
    try:
        return read_json(file, dict)
    except (OSError, ValueError):
        return {}


@contextmanager
def writing_progress(note: ProgressFile) -> Iterator[None]:
    """Within, what is trained writes a note in place of showing a bar."""
    token = _NOTE.set(note)
    try:
        yield
    finally:
        _NOTE.reset(token)
        note.told["begun"] = 0  # ended, well or not: if the process is killed from now on, it is not the run's fault
        note.write()


_NOTE: ContextVar[ProgressFile | None] = ContextVar("note", default=None)


def progress_bar(name: str, total: int, start: int, visible: bool) -> Any:
    """A bar over the steps of a phase, or the note of the run in its place."""
    note = _NOTE.get()
    if note is not None:
        note.phase(name, total, start)
        return note
    bar = ProgressBar(total=total, initial=start, desc=printable(name), disable=not visible, unit="step")
    bar.shown = {}
    return bar


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that a step ends before the run does; a second one cuts through."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def press(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
