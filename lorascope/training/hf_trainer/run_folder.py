"""Run folder of a Trainer: create it, append to it, resume it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lorascope.adapters.peft_layers import unwrapped_parameters
from lorascope.files.typed_json import read_json
from lorascope.methods.base import Method, Step
from lorascope.observe import factors_of
from lorascope.observe.base import Observer
from lorascope.observe.trainable import adapters
from lorascope.runs.folders import lock_run
from lorascope.runs.manifest import Manifest, State
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Item, Record
from lorascope.training.base_weights import Base
from lorascope.training.checkpoints import pack_rows, unpack_rows
from lorascope.training.session import merge_records
from lorascope.training.state import load_tree, save_state, save_tree

FLUSH_SECONDS = 30.0
# Folders into which this process records, with the finalizer of each recording.
_OPEN: dict[Path, weakref.finalize] = {}


class Recording:
    """Record of one training in a run folder.

    Parameters
    ----------
    path : path
        Run folder. Another run in it is moved aside; a finished run that resumes is copied aside.
    meta : Manifest
        Content of ``run.json``; ``started`` differs at each start.
    step : Step
        Current step, which the trainer updates.
    base : Base
        Base weights W_0.
    method : Method or None
        Method of lorascope, if one trains.
    observers : sequence of Observer
        Observers that record each step.
    before : dict or None
        Result of ``state()`` at the step from which training resumes; None at the start of a run.
    """

    def __init__(
        self,
        path: Path,
        meta: Manifest,
        step: Step,
        base: Base,
        method: Method | None,
        observers: Sequence[Observer],
        before: dict[str, Any] | None,
    ) -> None:
        self.path, self.step, self.base, self.method = path, step, base, method
        self.observers = [dataclasses.replace(observer) for observer in observers]
        self._failing = self._final_state_saved = False
        self._recorded: tuple[int, set[tuple[str, str]]] = (-1, set())
        self._clock, self._seconds_before, self._flushed = time.monotonic(), 0.0, math.inf
        # The traceback of a failed training may still reference its recording, so end that one here.
        if (abandoned := _OPEN.pop(path.resolve(), None)) is not None:
            abandoned()
        create_folder(path, meta.id if before else None)
        self.writer = RunWriter(path, meta)
        self._lock = ExitStack()
        self._lock.enter_context(lock_run(path))
        # Mark the run as broken when the recording is deleted or the process ends, without a reference to the model.
        self._finalizer = weakref.finalize(self, mark_lost_run, self.writer, self._lock)
        _OPEN[path.resolve()] = self._finalizer
        if before is None:
            self.writer.begin(None)
            self.record({})
        else:
            self._resume_recording(before)
        self._write_rows()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training, including before it was resumed."""
        return self._seconds_before + time.monotonic() - self._clock

    def record(self, own: dict[str, float | None]) -> None:
        """Record the values of the trainer, the method and the observers in this step."""
        items: list[Item] = [Record(name, value) for name, value in own.items() if value is not None]
        items += [Record("seconds", self.seconds), *(self.method.records(self.step) if self.method else ())]
        self.add(merge_records(self.step, items, self.observers))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.attempt(self._write_rows)

    def add(self, items: Iterable[Item]) -> None:
        """Add the records of this step that it does not have yet."""
        finished = self.step.finished
        known = self._recorded[1] if self._recorded[0] == finished else set()
        fresh = [i for i in items if not isinstance(i, Record) or (i.quantity, i.module) not in known]
        self._recorded = (finished, known | {(i.quantity, i.module) for i in fresh if isinstance(i, Record)})
        self.writer.collect(finished, fresh)
        if not self._failing:  # after a failure wait for the next flush: each attempt can block for seconds
            self.attempt(self.writer.write_arrays)

    def _write_rows(self) -> None:
        self._flushed = time.monotonic()
        self.writer.flush()

    def attempt(self, write: Callable[[], object]) -> None:
        """Write, or warn once per outage: a recorder must not stop training."""
        try:
            write()
            self._failing = False
        except OSError as error:
            if not self._failing:
                warnings.warn(f"{error}; training continues, and its records are kept in memory", stacklevel=2)
            self._failing = True

    def state(self) -> dict[str, Any]:
        """Return the state from which a checkpoint resumes the recording; save W_0 in the run folder first."""
        if self.base.kept and not self._base_file.exists():
            save_tree(self._base_file, self.base.kept)
        return {
            "id": self.writer.meta.id,
            "observers": [observer.state() for observer in self.observers],
            "table": pack_rows(self.writer.table()),
            "seconds": self.seconds,
        }

    @property
    def _base_file(self) -> Path:
        return self.path / "resume/base.safetensors"

    @property
    def _state_file(self) -> Path:
        return self.path / "state/last.safetensors"

    def _resume_recording(self, before: dict[str, Any]) -> None:
        for observer, state in zip(self.observers, before["observers"], strict=True):
            observer.restore(state)
        self._seconds_before = before["seconds"]
        self.writer.begin(unpack_rows(before["table"]))
        if self.base.kept:
            if not self._base_file.exists():
                raise ValueError(f"cannot resume: W_0 is missing, {self._base_file}; pass the folder of the run as out")
            self.base.kept.update(load_tree(self._base_file))

    def save_final_state(self) -> None:
        """Save the current state as the final state of the training."""
        self._final_state_saved = True
        if not self.step.last:  # training stopped early, so this step was not recorded as the last
            self.step.total = self.step.finished
            self.add(merge_records(self.step, (), self.observers))
        self.add(factors_of(self.step.model))
        if self.method is not None:
            save_state(self._state_file, self.step.model, self.step.optimizer, self.method)
        found = adapters(self.step.model)
        if self.method is None and found:  # an export includes other parameters that PEFT trains, such as a head
            live = unwrapped_parameters(self.step.model)
            save_tree(self._state_file, {name: live[name] for name in self.base.kept if live[name].requires_grad})
        ranks = {name: adapter.rank for name, adapter in found.items()}
        self.writer.meta.states = {"last": State(self.step.finished, ranks)}

    def mark_interrupted(self) -> None:
        """Close the folder of a training that does not continue, as broken."""
        self._finalizer()

    def finish(self) -> Run:
        """Close the folder and return its run."""
        if not self._final_state_saved:
            self.save_final_state()
        meta = self.writer.meta
        if not meta.states:  # too late to save it: the Trainer may have loaded another state
            meta.error = "the state after its last step could not be written"
        meta.seconds = meta.total_seconds = self.seconds
        run = self.writer.finish("done" if meta.states else "broken")
        self._finalizer.detach()
        self._lock.close()
        return run


def create_folder(folder: Path, resumed: str | None) -> None:
    """Move another run in the folder aside; if the run that resumes was finished, copy it aside.

    Raises
    ------
    RunLocked
        Another process writes to the folder.
    ValueError
        The path is a file, or the folder contains files that are not a run.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {folder}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "run.json").exists():
        raise ValueError(f"cannot record into {folder}: it contains files but no run; pass another out")
    run = Run.read(folder)
    aside = _free_folder(folder.with_name(f"{folder.name}-{run.id}"))
    with lock_run(folder):
        if run.id != resumed:
            folder.rename(aside)
        elif run.finished:
            shutil.copytree(folder, aside, ignore=shutil.ignore_patterns("resume"))


def _free_folder(folder: Path) -> Path:
    names = (folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 10_000)))
    return next(name for name in names if not name.exists())


def mark_lost_run(writer: RunWriter, lock: ExitStack) -> None:
    """Mark a run that was not finished as broken, unless another run has replaced it."""
    with lock, suppress(OSError):
        file = writer.path / "run.json"
        if file.exists() and read_json(file, dict).get("started") == writer.meta.started:
            writer.meta.error = "the training ended before its last step"
            writer.finish("broken")
