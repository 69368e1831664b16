"""Run folder of a training that another loop runs: create it, append to it, resume it."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from lorascope.methods.method import Method, Step
from lorascope.observe.observer import Observer
from lorascope.runs.folders import lock_run
from lorascope.runs.manifest import Manifest
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Item
from lorascope.training.checkpoints import pack_rows, unpack_rows
from lorascope.training.curve_report import CurveReport
from lorascope.training.recording import Recording
from lorascope.training.state import load_tree, save_tree

T = TypeVar("T")

FLUSH_SECONDS = 30.0
# The whole table is written each time. If that takes longer, the pause before the next time is longer in proportion.
_LONG_FLUSH = 0.3
# Folders into which this process records, with the finalizer of each recording.
_OPEN: dict[Path, weakref.finalize] = {}


class ForeignRecording(Recording):
    """Recording into the run folder of a training that another loop runs; it is written during the training.

    It never stops the training, unless an observer asks for it.
    Another run in the folder is moved aside; a finished run that resumes is copied aside. ``before`` is the result of
    ``state`` at the step from which training resumes. A run that is not closed when the process ends is marked as
    broken with the error ``lost``, or keeps the status "running" if that is None.
    """

    def __init__(
        self,
        path: Path,
        meta: Manifest,
        step: Step,
        method: Method | None,
        observers: Sequence[Observer],
        before: dict[str, Any] | None,
        lost: str | None = "the training ended before its last step",
        report: CurveReport | None = None,
    ) -> None:
        path = path.absolute()  # the program may change its directory
        # The traceback of a failed training may still reference its recording, so end that one here.
        if (abandoned := _OPEN.pop(path.resolve(), None)) is not None:
            abandoned()
        aside = create_folder(path, meta.id if before else None)
        super().__init__(path, meta, step, method, observers, report)
        self._failing = False
        self._process = os.getpid()
        self._final_step: int | None = None  # step of the saved final state
        self._next_flush = math.inf
        self._base_file = path / "resume/base.safetensors"
        self._lock = ExitStack()
        self._lock.enter_context(lock_run(path))
        # Write the rows when the recording is deleted or the process ends, without a reference to the model.
        self.mark_interrupted = _OPEN[path.resolve()] = weakref.finalize(
            self, _close_lost_run, self.writer, self._lock, lost, report, self._process
        )
        if before is None:
            try:
                self.begin_rows(None)
                self.record()
            except Exception:  # a tracker cannot start, or an observer is rejected: leave everything as it was
                self.abandon_report()
                _OPEN.pop(path.resolve()).detach()
                self._lock.close()
                shutil.rmtree(path)
                if aside is not None:
                    aside.rename(path)
                raise
        else:
            self.resume(before["observers"], before["seconds"])
            self.begin_rows(unpack_rows(before["table"]))
            if self.base.kept:
                if not self._base_file.exists():
                    raise ValueError(
                        f"cannot resume: W_0 is missing, {self._base_file}; pass the folder of the run as out"
                    )
                self.base.kept.update(load_tree(self._base_file))
        self._write_rows()

    def record(self, loss: float | None = None, grad_norm: float | None = None, lr: float | None = None) -> None:
        if self._is_replaced():
            return
        super().record(loss, grad_norm, lr)
        if time.monotonic() > self._next_flush:
            self.attempt(self._write_rows)

    def _write_rows(self) -> None:
        start = time.monotonic()
        self._next_flush = start + FLUSH_SECONDS  # if writing fails
        self.writer.flush()
        end = time.monotonic()
        self._next_flush = end + FLUSH_SECONDS * max(1.0, (end - start) / _LONG_FLUSH)

    def add(self, items: Iterable[Item]) -> None:
        if self._is_replaced():
            return
        self._collect(items)
        if not self._failing:  # after a failure wait for the next flush: each attempt can block for seconds
            self.attempt(self.writer.write_arrays)

    def attempt(self, write: Callable[[], T]) -> T | None:
        """Write and return the result, or warn once per outage and return None: a recorder must not stop training."""
        if self._is_replaced():
            return None
        try:
            result = write()
            self._failing = False
            return result
        except OSError as error:
            if not self._failing:
                warnings.warn(f"{error}; training continues, and its records are kept in memory", stacklevel=2)
            self._failing = True
            return None

    def _is_replaced(self) -> bool:
        """Return whether another recording has taken the folder, or this is a forked process; warn once if so."""
        problem = ""
        if os.getpid() != self._process:
            problem = f"another process opened the recorder of {self.path}: open one in this process"
        elif not self.mark_interrupted.alive:
            problem = f"another recorder writes to {self.path}: pass it another out"
        if problem and not self._failing:
            warnings.warn(problem, stacklevel=4)
        self._failing |= bool(problem)
        return bool(problem)

    def state(self) -> dict[str, Any]:
        """Return the state from which a checkpoint resumes the recording; save W_0 in the run folder first."""
        if self.base.kept and not self._base_file.exists():
            self.writer.require_folder()
            save_tree(self._base_file, self.base.kept)
        return super().state() | {"id": self.writer.meta.id, "table": pack_rows(self.writer.table())}

    def save_final_state(self) -> None:
        """Save the current state as the final state of the training."""
        self._final_step = self.step.finished
        if not self.step.last:  # training stopped early, so this step was not recorded as the last
            self.step.total = self.step.finished
            self.observe()
        self.writer.meta.states = {"last": self.save_state(self.path / "state/last.safetensors")}

    def finish(self) -> Run:
        """Close the folder and return its run."""
        if self._final_step != self.step.finished:
            self.save_final_state()
        meta = self.writer.meta
        if not meta.states:  # too late to save it: the Trainer may have loaded another state
            meta.error = "the state after its last step could not be written"
        meta.error = self.step.stop or meta.error
        return self.close("done" if meta.states and not self.step.stop else "broken")

    def close(self, status: str) -> Run:
        run = super().close(status)
        self.mark_interrupted.detach()
        self._lock.close()
        return run


def create_folder(folder: Path, resumed: str | None) -> Path | None:
    """Make room for a run folder: move another run aside and return its new place; copy a finished run that resumes.

    Raise RunLocked if another process writes to the folder, and a ValueError if it contains files but no run.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {folder}")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / "run.json").exists():
        raise ValueError(f"cannot record into {folder}: it contains files but no run; pass another out")
    run = Run.read(folder)
    name = f"{folder.name}-{run.id}"
    aside = folder.with_name(name)
    for number in itertools.count(2):
        if not aside.exists():
            break
        aside = folder.with_name(f"{name}-{number}")
    with lock_run(folder):
        if run.id != resumed:
            folder.rename(aside)
            return aside
        if run.finished:
            shutil.copytree(folder, aside, ignore=shutil.ignore_patterns("resume"))
        return None


def _close_lost_run(
    writer: RunWriter, lock: ExitStack, error: str | None, report: CurveReport | None, process: int
) -> None:
    """Write the rows of a run that was not finished, unless another has replaced it; an error marks it as broken."""
    if os.getpid() != process:  # a forked one ends, and the recording does not
        return
    if report is not None:
        report.close(None)
    with lock, suppress(OSError):
        if writer.has_manifest():
            if error is None:
                writer.flush()
            else:
                writer.meta.error = error
                writer.finish("broken")
