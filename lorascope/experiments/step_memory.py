"""Memory of one optimizer step, measured in a fresh process.

The peak is the largest number of allocated bytes during the last step. On the CPU the profiler counts allocations from
before the model is loaded; on CUDA it is ``max_memory_allocated``. On other devices the peak is NA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lorascope.experiments.isolated_run import Data, IsolatedRun, Model, run_in_own_process
from lorascope.methods.method import Method
from lorascope.observe import memory
from lorascope.runs.run import Run
from lorascope.schema.records import Record
from lorascope.training.loop import advance
from lorascope.training.session import Session

__all__ = ["measure"]

_WINDOW = "lorascope: measured step"


def measure(model: Model, data: Data, method: Method | str, *, steps: int = 2, **options: Any) -> Run:
    """Measure the memory that training with a method uses, with the peak of one step.

    Parameters
    ----------
    model : str or callable
        Name for ``models.load``, or a function that returns a fresh model.
    data : Task, str or path
        See ``tasks.load``.
    method : Method or str
        Method to measure; only its first phase, if it has several.
    steps : int
        Number of steps, default 2. The peak belongs to the last step; the first one creates the optimizer's state. For
        LISA, pass the interval of a real run, such as 20: by default it would resample blocks in the measured step.
    **options
        ``seed``, ``out``, ``root``, ``overwrite`` and ``device``, see ``isolated_run.IsolatedRun``, and settings
        of ``train``, such as ``batch_size``.

    Returns
    -------
    Run
        With ``parameter_bytes``, ``gradient_bytes`` and ``optimizer_bytes`` after each step, and ``peak_bytes`` of the
        last. lorascope's own copy of the base weights is excluded. A repeated call returns the finished run.
    """
    return run_in_own_process(_measure_memory, model, data, method, steps=steps, **options)


def _measure_memory(job: IsolatedRun) -> Path:
    # Created first: the profiler must count the allocations of the model.
    allocator = _allocator(job.device)

    def take(session: Session) -> None:
        step = session.step
        for index in range(session.begin(), step.total):
            with allocator.window() if index == step.total - 1 else nullcontext():
                loss, norm, rate = advance(session, index)
            session.record(loss, norm, rate)
        session.add([Record("peak_bytes", allocator.peak())])

    return job.run("memory", take, (memory(every=1),))


class _Allocator(NamedTuple):
    """Meter of one step: its context, and then the peak of allocated bytes in it, or NaN if it is unknown."""

    window: Callable[[], AbstractContextManager[Any]] = nullcontext
    peak: Callable[[], float] = lambda: math.nan


def _allocator(device: str) -> _Allocator:
    """Return the meter of a device; on the CPU the profiler counts every allocation from now on."""
    torch_device = torch.device(device)
    if torch_device.type == "cuda":  # which need not be the current device

        def window() -> AbstractContextManager[None]:
            torch.cuda.reset_peak_memory_stats(torch_device)
            return nullcontext()

        return _Allocator(window, lambda: float(torch.cuda.max_memory_allocated(torch_device)))
    # Builds without Kineto cannot profile memory.
    if torch_device.type != "cpu" or not torch.autograd.kineto_available():
        return _Allocator()
    profiling = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    profiling.start()

    def peak() -> float:
        profiling.stop()
        profiler: Any = profiling.profiler
        return float(_peak_in_window(profiler.kineto_results.events()))

    return _Allocator(lambda: record_function(_WINDOW), peak)


def _peak_in_window(events: Iterable[Any]) -> int:
    """Return the peak of allocated bytes in the window, from the profiler's allocations and releases."""
    events = sorted(events, key=lambda event: event.start_ns())
    window = next(event for event in events if event.name() == _WINDOW)
    alive = peak = 0
    for event in events:
        if event.start_ns() > window.end_ns():
            break
        # The first event inside the window also includes what was allocated before it.
        if event.start_ns() > window.start_ns():
            peak = max(peak, alive)
        if event.name() == "[memory]":
            alive += event.nbytes()
    return max(peak, alive)


def __dir__() -> list[str]:
    return __all__
