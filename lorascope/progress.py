"""What a person sees of a long piece of work, and how they stop it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

from lorascope.evaluation import Score


class ProgressBar(tqdm):
    """A bar that shows the latest loss and the latest validation metric."""

    shown: dict[str, str]

    def show(self, loss: float, score: Score | None) -> None:
        """One step further."""
        self.shown["loss"] = f"{loss:.3f}"
        if score is not None:
            self.shown[score.name] = f"{score.metric:.3f}"
        self.set_postfix(self.shown, refresh=False)
        self.update()


def progress_bar(name: str, total: int, start: int, visible: bool) -> Any:
    """A bar over the steps of a phase."""
    bar = ProgressBar(total=total, initial=start, desc=name, disable=not visible, unit="step")
    bar.shown = {}
    return bar


@contextmanager
def interruptible() -> Iterator[threading.Event]:
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
