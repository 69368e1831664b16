"""Recording of one training: rows, arrays and states of its run folder, and the time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.adapters.delta import adapters
from lorascope.adapters.host_weights import shared_copies
from lorascope.adapters.peft_layers import unwrapped_parameters
from lorascope.methods.method import Method, Step
from lorascope.observe import factors_of
from lorascope.observe.factor_snapshots import incomplete_norm_records
from lorascope.observe.observer import Observer
from lorascope.runs.manifest import Manifest, State
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Item, Record
from lorascope.training.base_weights import Base
from lorascope.training.curve_report import CurveReport
from lorascope.training.peak_memory import peak_memory
from lorascope.training.state import save_state, save_tree


def run_records(values: Mapping[str, float | None]) -> list[Record]:
    """Return records of values of a whole run, without those that are None."""
    return [Record(name, value) for name, value in values.items() if value is not None]


class Recording:
    """Recording of one training in a run folder, by ``train`` or by a recorder of another loop.

    The training updates ``step``; ``meta`` is the content of ``run.json``. Observers have a state, so they are copied.
    A ``report`` gets everything that is recorded after ``begin_rows``.
    """

    def __init__(
        self,
        path: Path,
        meta: Manifest,
        step: Step,
        method: Method | None,
        observers: Sequence[Observer],
        report: CurveReport | None = None,
    ) -> None:
        assert isinstance(step.base, Base)
        self.path, self.step, self.base, self.method = path, step, step.base, method
        self.observers = [dataclasses.replace(observer) for observer in observers]
        self.writer = RunWriter(path, meta)
        self.report = report
        self._recorded: tuple[int, set[tuple[str, str]]] = (-1, set())
        self._clock, self._seconds_before = time.monotonic(), 0.0

    def begin_rows(self, table: pd.DataFrame | None) -> None:
        """Start the run folder and the report; see ``RunWriter.begin``."""
        self.writer.begin(table)
        if self.report is not None:
            self.report.open(self.path, self.writer.meta)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training, including before it was resumed."""
        return self._seconds_before + time.monotonic() - self._clock

    def record(self, loss: float | None = None, grad_norm: float | None = None, lr: float | None = None) -> None:
        """Record the values of the training, the method and the observers in this step."""
        values = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "seconds": self.seconds}
        items: list[Item] = [*run_records(values)]
        if self.method is not None:
            items += self.method.records(self.step)
        self._collect(items)
        self.observe()

    def observe(self) -> None:
        """Record the values of the observers in this step, which share copies of the trained parameters."""
        with shared_copies():
            for observer in self.observers:  # one by one: two of a kind may be due at the same step
                if items := list(observer(self.step)):
                    self.add(items)

    def add(self, items: Iterable[Item]) -> None:
        """Record further items in this step."""
        self._collect(items)
        self.writer.write_arrays()

    def _collect(self, items: Iterable[Item]) -> None:
        """Take all items but the values that an earlier call has, such as a rank of the method and of an observer."""
        finished, (recorded_step, recorded) = self.step.finished, self._recorded
        if recorded_step != finished:
            recorded = set()
        fresh: list[Item] = []
        added = []
        for item in items:
            if isinstance(item, Record):
                key = item.quantity, item.module
                if key in recorded:
                    continue
                added.append(key)
                if not item.module:
                    self.step.values[item.quantity] = finished, item.value
            fresh.append(item)
        recorded.update(added)  # at the end, since a quantity with an index has several records
        self._recorded = finished, recorded
        self.writer.collect(finished, fresh)
        if self.report is not None:
            self.report.collect(finished, fresh)

    def state(self) -> dict[str, Any]:
        """Return the state from which a checkpoint resumes the recording, except for the rows."""
        return {"observers": [observer.state() for observer in self.observers], "seconds": self.seconds}

    def resume(self, observers: Sequence[dict[str, Any]], seconds: float) -> None:
        """Restore the result of ``state``."""
        for observer, state in zip(self.observers, observers, strict=True):
            observer.restore(state)
        self._seconds_before = seconds

    def save_state(self, file: Path) -> State:
        """Write what training changed, record the factors, and return the entry of the state for ``run.json``."""
        model = self.step.model
        self.add(factors_of(model, self.step.adapter_names))
        self.add(incomplete_norm_records(model, self.step.adapter_names))
        self.writer.require_folder()
        if self.method is not None:
            save_state(file, model, self.step.optimizer, self.method)
        elif adapters(model, self.step.adapter_names):
            # An export includes other parameters that PEFT trains, such as a head.
            live = unwrapped_parameters(model)
            save_tree(file, {name: live[name] for name in self.base.kept if live[name].requires_grad})
        return self.state_entry()

    def state_entry(self) -> State:
        """Return the entry of the current state for ``run.json``."""
        attached = adapters(self.step.model, self.step.adapter_names)
        return State(self.step.finished, {name: adapter.rank for name, adapter in attached.items()})

    def flush_report(self) -> None:
        """Send the values of this step to the report."""
        if self.report is not None:
            self.report.flush()

    def abandon_report(self) -> None:
        """Close the report of a training that failed, without the unfinished step; nothing happens if it is closed."""
        if self.report is not None:
            self.report.discard()
            self.report.close(None)

    def close(self, status: str) -> Run:
        """Write the rows, and ``run.json`` with the time, and return the run."""
        meta = self.writer.meta
        meta.seconds = self.seconds
        meta.total_seconds += meta.seconds  # until now those of the earlier phases
        if meta.device is not None:
            meta.peak_memory = peak_memory(meta.device)
        run = self.writer.finish(status)
        if self.report is not None:
            self.report.close(run)
        return run
