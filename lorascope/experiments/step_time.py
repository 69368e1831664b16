"""Seconds of one optimizer step by part: forward, backward, and the rest.

On the CPU these are the seconds that one thread computes, regardless of other load on the machine. On an accelerator
they are the seconds until it has finished its work.

Source: LISA (arXiv 2403.17919), figure 4, which shows forward and backward of one iteration.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.experiments.isolated_run import Data, IsolatedRun, Model, run_in_own_process
from lorascope.methods.method import Batch, Method
from lorascope.runs.run import Run
from lorascope.schema.records import Quantity, Record, register
from lorascope.training.loop import advance
from lorascope.training.session import Session

__all__ = ["measure"]

_COMPUTED = {
    "forward": "the loss of the batch",
    "backward": "the gradients of the loss",
    "rest": "everything else in a step: batch, random draws, masks, clipping, optimizer",
}
for _name, _subject in _COMPUTED.items():
    _quantity = Quantity(f"time of {_name}", "s", "none", "sum", f"seconds to compute {_subject}", "LISA, figure 4")
    register("measure it with ls.step_time.measure()", **{f"{_name}_seconds": _quantity})


def measure(model: Model, data: Data, method: Method | str, *, steps: int = 12, **options: Any) -> Run:
    """Measure the time that the steps of a method take.

    Parameters
    ----------
    model, data, method, **options
        See ``lorascope.step_memory.measure``.
    steps : int
        Number of steps, default 12. The figure excludes the first two, which are slower. For LISA, pass the interval of
        a real run, such as 20: by default it would resample blocks every second step.

    Returns
    -------
    Run
        With the seconds of each step, such as ``forward_seconds``. A repeated call returns the finished run.
    """
    return run_in_own_process(_measure_seconds, model, data, method, steps=steps, **options)


def _measure_seconds(job: IsolatedRun) -> Path:
    if job.device.startswith("cpu"):
        # With several threads, CPU seconds would exceed the time that passes.
        torch.set_num_threads(1)

    def take(session: _TimedSession) -> None:
        for index in range(session.begin(), session.step.total):
            start = clock(session.device)
            loss, norm, rate = advance(session, index)
            total = clock(session.device) - start
            forward = Record("forward_seconds", session.forward)
            backward = Record("backward_seconds", session.gradients - session.forward)
            session.add([forward, backward, Record("rest_seconds", total - session.gradients)])
            session.record(loss, norm, rate)

    return job.run("pace", take, session=_TimedSession)


def clock(device: str) -> float:
    """Return the time to measure steps: CPU seconds of this process, or an accelerator's time once its work is done."""
    if device.startswith("cpu"):
        return time.process_time()
    torch.accelerator.synchronize(torch.device(device))
    return time.perf_counter()


class _TimedSession(Session):
    """Session that measures the seconds of the loss, ``forward``, and of loss and gradients together, ``gradients``."""

    forward = gradients = 0.0

    def backward(self) -> float:
        self.forward, start = 0.0, clock(self.device)
        loss = super().backward()
        self.gradients = clock(self.device) - start
        return loss

    def _batch_loss(self, model: nn.Module, batch: Batch, params: Mapping[str, Tensor] | None) -> Tensor:
        start = clock(self.device)
        loss = super()._batch_loss(model, batch, params)
        self.forward += clock(self.device) - start
        return loss


def __dir__() -> list[str]:
    return __all__
