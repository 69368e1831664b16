"""The memory of one optimizer step, measured where nothing else is alive: in a process of its own.

The peak is the allocator's own high-water mark during the last step: of the CPU's allocations as the profiler counts
them from before the model is loaded, or CUDA's ``max_memory_allocated``. Elsewhere it is NA; it is never worked out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from joblib.externals.loky import ProcessPoolExecutor
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lorascope import models, tasks
from lorascope.loop import advance
from lorascope.method import Method
from lorascope.methods import METHODS
from lorascope.observe import memory
from lorascope.plan import Base, Plan, claim, finished_run, first_use, held
from lorascope.records import Record
from lorascope.run import Run
from lorascope.session import Session
from lorascope.settings import Settings
from lorascope.state import seeded
from lorascope.tasks import Task

_WINDOW = "lorascope: measured step"


def measure(
    model: str | Callable[[], nn.Module],
    data: Task | str | Path,
    method: Method | str,
    *,
    steps: int = 2,
    seed: int = 0,
    out: str | Path | None = None,
    root: str | Path = "runs",
    overwrite: bool = False,
    device: str = "cpu",
    **settings: Any,
) -> Run:
    """Measure what training by a method holds, with the peak of one step.

    Parameters
    ----------
    model : str or callable
        A name for ``models.load``, or something that makes a fresh model.
    data : Task, str or path
    method : Method or str
        Of a method with phases the first one is measured.
    steps : int
        The last of so many is the one whose peak is taken; the first makes the optimizer's state.
    seed : int
    out : path, optional
        The run folder; ``<root>/memory-<method>-<id>`` by default.
    root : path
    overwrite : bool
        Measure again.
    device : str
        The peak is known on "cpu" and "cuda", NA elsewhere.
    **settings
        Further settings of ``train``, such as ``batch_size`` and ``max_length``.

    Returns
    -------
    Run
        With ``parameter_bytes``, ``gradient_bytes`` and ``optimizer_bytes`` after each step, and ``peak_bytes`` of the
        last. lorascope's own copy of W_0 is left out. The same call finds a finished one.
    """
    method = METHODS[method]() if isinstance(method, str) else method
    asked = {"lr": method.lr, "head_lr": method.head_lr, "eval_size": 1, "test_size": 1} | settings
    with ProcessPoolExecutor(max_workers=1) as fresh:
        found = fresh.submit(
            _measure, model, data, method, Settings(steps=steps, **asked), seed, out, root, overwrite, device
        )
        return Run.read(found.result())


def _measure(
    model: str | Callable[[], nn.Module],
    data: Task | str | Path,
    method: Method,
    settings: Settings,
    seed: int,
    out: str | Path | None,
    root: str | Path,
    overwrite: bool,
    device: str,
) -> Path:
    """Measure in this process; gives the run folder."""
    allocator = _allocator(device)
    task = data if isinstance(data, Task) else tasks.load(str(data))
    living = models.load(model, task=task) if isinstance(model, str) else model()
    _take_over(living, device)
    task = task.fit(living)
    mark = first_use(living, task, seed)
    base = _Living(living)
    phase = replace(next(method.phases(base)), name="memory")
    plan = Plan(method, phase, task, settings, seed, mark.w0_hash, (memory(every=1),))
    folder = Path(out or Path(root) / f"memory-{method.name}-{plan.id}")
    claim(folder, plan, overwrite)
    if finished_run(folder, plan) is None:
        with held(folder), seeded(seed):
            _take_steps(Session(living, plan, base, folder, [], device), allocator)
    return folder


def _take_steps(session: Session, allocator: _Allocator) -> None:
    """Go through the steps, the last under the eyes of the allocator."""
    step = session.step
    for index in range(session.begin(), step.total):
        with allocator.window() if index == step.total - 1 else nullcontext():
            loss, norm, rate = advance(session, index)
        session.record(loss, norm, rate)
    session.writer.add(step.finished, [Record("peak_bytes", allocator.peak())])
    session.writer.meta |= {"seconds": session.seconds, "total_seconds": session.seconds}
    session.writer.finish("done")


def _take_over(model: nn.Module, device: str) -> None:
    """Have all tensors of a model allocated here: some loaders lay them on a mapped file, which no allocator sees."""
    model.to(device)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


class _Living(Base):
    """W_0 without copies, which belong to the toolkit and not to the method: what trains is not what it was."""

    def capture(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy nothing."""


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
