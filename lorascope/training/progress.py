"""Progress bars and progress files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lorascope.files.printable import printable
from lorascope.files.typed_json import read_json
from lorascope.files.whole_files import write_note
from lorascope.training.evaluation import Score

# Minimum seconds between two writes of a progress file during a phase.
_PAUSE = 1.0


class ProgressBar(tqdm):
    """Progress bar that shows the latest loss and the latest validation metric."""

    latest: dict[str, str]

    def display(self, *args: Any, **kwargs: Any) -> None:
        """Draw the bar, or disable it if its terminal is closed."""
        try:
            super().display(*args, **kwargs)
        except OSError:
            self.disable = True

    def close(self) -> None:
        """Close the bar, also if its terminal is closed."""
        with suppress(OSError):
            super().close()

    def show(self, loss: float, score: Score | None) -> None:
        """Advance by one step and show its loss and score."""
        self.latest["loss"] = f"{loss:.3f}"
        if score is not None:
            self.latest[score.name] = f"{score.metric:.3f}"
        self.set_postfix(self.latest, refresh=False)
        self.update()


class ProgressFile:
    """Small JSON file with the progress of a run, which other processes read; rewritten at most once per second.

    Its key ``begun`` counts the starts of the run without an end, which identifies runs that kill their process.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = {"begun": read_progress(file).get("begun", 0) + 1}
        self._written = 0.0
        self.write()

    def write(self) -> None:
        """Write the file."""
        self._written = time.monotonic()
        write_note(self.file, self.content)

    def show(self, loss: float, score: Score | None) -> None:
        """Advance by one step and show its loss and score."""
        self.content["step"] += 1
        if score is not None:
            self.content |= {"metric": score.metric, "metric_name": score.name}
        if time.monotonic() - self._written > _PAUSE:
            self.write()


def read_progress(file: Path) -> dict[str, Any]:
    """Return the content of a progress file; empty if it is missing or unreadable."""
    try:
        return read_json(file, dict)
    except (OSError, ValueError):
        return {}


@contextmanager
def writing_progress(file: ProgressFile) -> Iterator[None]:
    """Write a progress file instead of showing progress bars within the context."""
    token = _PROGRESS_FILE.set(file)
    try:
        yield
    finally:
        _PROGRESS_FILE.reset(token)
        file.content["begun"] = 0  # the run returned or raised, so a later death of the process is not its fault
        file.write()


# Set by the worker of a sweep around ``train``, which has no argument for it.
_PROGRESS_FILE: ContextVar[ProgressFile | None] = ContextVar("progress_file", default=None)


def progress_bar(name: str, total: int, start: int, visible: bool) -> AbstractContextManager[Any]:
    """Return a progress bar over the steps of a phase, or the progress file of the context if there is one."""
    file = _PROGRESS_FILE.get()
    if file is not None:
        file.content |= {"total": total, "step": start}
        file.write()
        return nullcontext(file)
    bar = ProgressBar(total=total, initial=start, desc=printable(name), disable=not visible, unit="step")
    bar.latest = {}
    return bar
