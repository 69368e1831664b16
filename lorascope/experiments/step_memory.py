"""The memory of one optimizer step, measured where nothing else is alive: in a process of its own.

The peak is the allocator's own high-water mark during the last step: of the CPU's allocations as the profiler counts
them from before the model is loaded, or CUDA's ``max_memory_allocated``. Elsewhere it is NA; it is never worked out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lorascope.experiments.isolated_run import Data, IsolatedRun, Model, run_in_own_process
from lorascope.methods.base import Method
from lorascope.observe import memory
from lorascope.runs.run import Run
from lorascope.schema.records import Record
from lorascope.training.loop import advance
from lorascope.training.session import Session

_WINDOW = "lorascope: measured step"


def measure(model: Model, data: Data, method: Method | str, *, steps: int = 2, **options: Any) -> Run:
    """Measure what training by a method holds, with the peak of one step.

    Parameters
    ----------
    model : str or callable
        A name for ``models.load``, or something that makes a fresh model.
    data : Task, str or path
    method : Method or str
        Of a method with phases the first one is measured.
    steps : int
        The last of so many is the one whose peak is taken; the first makes the optimizer's state. Give LISA the
        interval of a real run, such as 20: by default it would draw anew in the measured step.
    **options
        ``seed``, ``out``, ``root``, ``overwrite`` and ``device``, see ``isolated_run.run_in_own_process``, and settings
        of ``train``, such as ``batch_size``.

    Returns
    -------
    Run
        With ``parameter_bytes``, ``gradient_bytes`` and ``optimizer_bytes`` after each step, and ``peak_bytes`` of the
        last. lorascope's own copy of W_0 is left out. The same call finds a finished one.
    """
    return run_in_own_process(_measure_memory, model, data, method, steps=steps, **options)


def _measure_memory(job: IsolatedRun) -> Path:
    """Measure in this process; gives the run folder."""
    allocator = _allocator(job.device)
    return job.run("memory", lambda session: _measure_steps(session, allocator), (memory(every=1),))


def _measure_steps(session: Session, allocator: _Allocator) -> None:
    """Go through the steps, the last under the eyes of the allocator."""
    step = session.step
    for index in range(session.begin(), step.total):
        with allocator.window() if index == step.total - 1 else nullcontext():
            loss, norm, rate = advance(session, index)
        session.record(loss, norm, rate)
    session.writer.add(step.finished, [Record("peak_bytes", allocator.peak())])


class _Allocator:
    """One that tells no high-water mark."""

    def window(self) -> AbstractContextManager[Any]:
        """Around what is measured."""
        return nullcontext()

    def peak(self) -> float:
        """Most bytes alive at a time within the window, what was there before included."""
        return math.nan


class _Processor(_Allocator):
    """The CPU's: the profiler counts every allocation from now on."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def window(self) -> AbstractContextManager[Any]:
        return record_function(_WINDOW)

    def peak(self) -> float:
        self._profile.stop()
        told: Any = self._profile.profiler
        return float(high_water(told.kineto_results.events()))


class _Cuda(_Allocator):
    """CUDA's own count, on the card that is meant: left alone it would speak of the current one."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def window(self) -> AbstractContextManager[Any]:
        torch.cuda.reset_peak_memory_stats(self._device)
        return nullcontext()

    def peak(self) -> float:
        return float(torch.cuda.max_memory_allocated(self._device))


def _allocator(device: str) -> _Allocator:
    kind = device.partition(":")[0]
    if kind == "cpu" and torch.autograd.kineto_available():
        return _Processor()
    return _Cuda(device) if kind == "cuda" else _Allocator()


def high_water(events: Iterable[Any]) -> int:
    """Most bytes alive at a time within the window, from the profiler's list of allocations and releases."""
    events = sorted(events, key=lambda event: event.start_ns())
    window = next(event for event in events if event.name() == _WINDOW)
    alive = peak = 0
    for event in events:
        if event.start_ns() > window.end_ns():
            break
        if event.start_ns() > window.start_ns():
            peak = max(peak, alive)
        if event.name() == "[memory]":
            alive += event.nbytes()
    return max(peak, alive)
