"""The seconds of one optimizer step by part: forward, backward, and the rest.

On the CPU these are the seconds that one thread computes, whatever else runs on the machine; on an accelerator those
that pass until it has done its work.

Source: LISA (arXiv 2403.17919), figure 4, which draws forward and backward of one iteration.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.experiments.isolated_run import Data, IsolatedRun, Model, run_in_own_process
from lorascope.methods.base import Batch, Method
from lorascope.runs.run import Run
from lorascope.schema.records import Quantity, Record, register
from lorascope.training.loop import advance
from lorascope.training.session import Session

for _name, _label, _what in (
    ("forward_seconds", "forward", "the loss of the step's batch"),
    ("backward_seconds", "backward", "its gradients"),
    ("rest_seconds", "rest", "everything else of a step: its batch, draws, masks, clipping, the optimizer"),
):
    _definition = f"seconds that {_what} took"
    register(_name, Quantity(f"time of {_label}", "s", pool="sum", definition=_definition, source="LISA, figure 4"))


def measure(model: Model, data: Data, method: Method | str, *, steps: int = 12, **options: Any) -> Run:
    """Measure how long the steps of a method take.

    Parameters
    ----------
    model : str or callable
        A name for ``models.load``, or something that makes a fresh model.
    data : Task, str or path
    method : Method or str
        Of a method with phases the first one is measured.
    steps : int
        The first two are slower, and left out by the figure. Give LISA the interval of a real run, such as 20: by
        default it would draw anew in every second of so few.
    **options
        ``seed``, ``out``, ``root``, ``overwrite`` and ``device``, see ``isolated_run.run_in_own_process``, and settings
        of ``train``, such as ``batch_size``.

    Returns
    -------
    Run
        With ``forward_seconds``, ``backward_seconds`` and ``rest_seconds`` of each step. The same call finds a
        finished one.
    """
    return run_in_own_process(_measure_seconds, model, data, method, steps=steps, **options)


def _measure_seconds(job: IsolatedRun) -> Path:
    if job.device == "cpu":
        torch.set_num_threads(1)
    return job.run("pace", _time_steps, session=_TimedSession)


def _time_steps(session: _TimedSession) -> None:
    for index in range(session.begin(), session.step.total):
        start = session.clock()
        loss, norm, rate = advance(session, index)
        whole = session.clock() - start
        parts = {"forward": session.forward, "backward": session.both - session.forward, "rest": whole - session.both}
        session.writer.add(index + 1, [Record(f"{name}_seconds", seconds) for name, seconds in parts.items()])
        session.record(loss, norm, rate)


def clock(device: str) -> float:
    """Return the CPU seconds of this process, or on an accelerator the time once its queued work is done."""
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(torch.device(device))
    return time.perf_counter()


class _TimedSession(Session):
    """Notes how long the loss of a step takes, and how long loss and gradients together."""

    forward = both = 0.0

    def clock(self) -> float:
        """``clock`` of the device of the run."""
        return clock(self.device)

    def backward(self) -> float:
        self.forward, start = 0.0, self.clock()
        loss = super().backward()
        self.both = self.clock() - start
        return loss

    def _batch_loss(self, model: nn.Module, batch: Batch, params: Mapping[str, Tensor] | None) -> Tensor:
        start = self.clock()
        loss = super()._batch_loss(model, batch, params)
        self.forward += self.clock() - start
        return loss
