"""The run folder of a training that somebody else does: room made for it, written as it goes on, gone on with."""

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
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Item, Record
from lorascope.training.base_weights import Base
from lorascope.training.checkpoints import pack_rows, unpack_rows
from lorascope.training.session import merge_records
from lorascope.training.state import load_tree, save_state, save_tree

FLUSH_SECONDS = 30.0
# Folders in which this process records, with the end of each recording.
_OPEN: dict[Path, weakref.finalize] = {}


class Recording:
    """What is written of one training.

    Parameters
    ----------
    path : path
        The run folder; what lies there is moved aside, unless it is this very run and unfinished.
    meta : dict
        What ``run.json`` will hold; ``started`` is another one at each start.
    step : Step
        The living one, kept up to date by whoever trains.
    base : Base
        Its W_0.
    method : Method or None
        One of ours, if one trains.
    observers : sequence of Observer
    before : dict or None
        ``state()`` at the step from which the training goes on.
    """

    def __init__(
        self,
        path: Path,
        meta: dict[str, Any],
        step: Step,
        base: Base,
        method: Method | None,
        observers: Sequence[Observer],
        before: dict[str, Any] | None,
    ) -> None:
        self.path, self.step, self.base, self.method = path, step, base, method
        self.observers = [dataclasses.replace(observer) for observer in observers]
        self._failing = self._concluded = False
        self._told: tuple[int, set[tuple[str, str]]] = (-1, set())
        self._clock, self._seconds_before, self._flushed = time.monotonic(), 0.0, math.inf
        # A recording that a failed training left behind may still be referenced by its traceback.
        if (abandoned := _OPEN.pop(path.resolve(), None)) is not None:
            abandoned()
        create_folder(path, meta["id"] if before else None)
        self.writer = RunWriter(path, meta)
        self._lock = ExitStack()
        self._lock.enter_context(lock_run(path))
        # Its last words, whether it is forgotten or the process ends first. They must not keep the model alive.
        self._last_words = weakref.finalize(self, mark_lost_run, self.writer, self._lock)
        _OPEN[path.resolve()] = self._last_words
        if before is None:
            self.writer.begin(None)
            self.look({})
        else:
            self._resume_recording(before)
        self._write_rows()

    @property
    def seconds(self) -> float:
        """Wall-clock time since the beginning, over all resumptions."""
        return self._seconds_before + time.monotonic() - self._clock

    def look(self, own: dict[str, float | None]) -> None:
        """Collect what trainer, method and observers have to say of this step."""
        told: list[Item] = [Record(name, value) for name, value in own.items() if value is not None]
        told += [Record("seconds", self.seconds), *(self.method.records(self.step) if self.method else ())]
        self.add(merge_records(self.step, told, self.observers))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.attempt(self._write_rows)

    def add(self, items: Iterable[Item]) -> None:
        """Take in what is known of this step, each thing once."""
        finished = self.step.finished
        known = self._told[1] if self._told[0] == finished else set()
        fresh = [i for i in items if not isinstance(i, Record) or (i.quantity, i.module) not in known]
        self._told = (finished, known | {(item.quantity, item.module) for item in fresh if isinstance(item, Record)})
        self.writer.collect(finished, fresh)
        if not self._failing:  # else with the next flush: a folder that does not answer costs seconds
            self.attempt(self.writer.write_arrays)

    def _write_rows(self) -> None:
        self._flushed = time.monotonic()
        self.writer.flush()

    def attempt(self, write: Callable[[], object]) -> None:
        """Write, or else warn once: a recorder does not stop a training."""
        try:
            write()
            self._failing = False
        except OSError as error:
            if not self._failing:
                warnings.warn(f"{error}; the training continues, and the record is kept in memory", stacklevel=2)
            self._failing = True

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to hold, so that the recording can go on from it; W_0 is put into the folder."""
        if self.base.kept and not self._base_file.exists():
            save_tree(self._base_file, self.base.kept)
        return {
            "id": self.writer.meta["id"],
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
                raise ValueError(f"W_0 of this run is gone, {self._base_file}: give its folder by out=, or begin anew")
            self.base.kept.update(load_tree(self._base_file))

    def save_final_state(self) -> None:
        """Keep the state as it is now, as the one that the training ends with."""
        self._concluded = True
        if not self.step.last:  # stopped early, at a step that nobody knew to be the last
            self.step.total = self.step.finished
            self.add(merge_records(self.step, (), self.observers))
        self.add(factors_of(self.step.model))
        if self.method is not None:
            save_state(self._state_file, self.step.model, self.step.optimizer, self.method)
        found = adapters(self.step.model)
        if self.method is None and found:  # what PEFT trains beside them, such as a head, is part of an export
            live = unwrapped_parameters(self.step.model)
            save_tree(self._state_file, {name: live[name] for name in self.base.kept if live[name].requires_grad})
        ranks = {name: adapter.rank for name, adapter in found.items()}
        self.writer.meta["states"] = {"last": {"step": self.step.finished, "ranks": ranks}}

    def mark_interrupted(self) -> None:
        """Close the folder of a training that is not gone on with."""
        self._last_words()

    def finish(self) -> Run:
        """Close the folder."""
        if not self._concluded:
            self.save_final_state()
        meta = self.writer.meta
        if not meta["states"]:  # the Trainer may have loaded another state since
            meta["error"] = "the state after its last step could not be written"
        meta["seconds"] = meta["total_seconds"] = self.seconds
        run = self.writer.finish("done" if meta["states"] else "broken")
        self._last_words.detach()
        self._lock.close()
        return run


def create_folder(folder: Path, going_on: str | None) -> None:
    """Move the run that lies in a folder aside; one that is gone on with stays, and if it was finished a copy goes.

    Raises
    ------
    RunLocked
        Another process writes there.
    ValueError
        Something else lies there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "run.json").exists():
        raise ValueError(f"{folder} is not empty and holds no run: give another folder")
    run = Run.read(folder)
    aside = _free_folder(folder.with_name(f"{folder.name}-{run.id}"))
    with lock_run(folder):
        if run.id != going_on:
            folder.rename(aside)
        elif run.finished:
            shutil.copytree(folder, aside, ignore=shutil.ignore_patterns("resume"))


def _free_folder(folder: Path) -> Path:
    names = (folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 10_000)))
    return next(name for name in names if not name.exists())


def mark_lost_run(writer: RunWriter, lock: ExitStack) -> None:
    """Say of a run that nobody finished that it is broken, if it lies there still."""
    with lock, suppress(OSError):
        file = writer.path / "run.json"
        if file.exists() and read_json(file, dict).get("started") == writer.meta["started"]:
            writer.meta["error"] = "the training ended before its last step"
            writer.finish("broken")
