"""A measured run in a separate process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from joblib.externals.loky import ProcessPoolExecutor
from torch import nn

from lorascope.inputs import models, tasks
from lorascope.inputs.computation import set_dtype
from lorascope.inputs.tasks import Task
from lorascope.methods.method import Method, from_config, target_parts
from lorascope.observe.observer import Observer
from lorascope.runs.folders import lock_run
from lorascope.runs.run import Run
from lorascope.training.base_weights import Base, prepare_model
from lorascope.training.output_folder import finished_run, prepare_folder
from lorascope.training.run_spec import RunSpec
from lorascope.training.session import Session
from lorascope.training.settings import Settings
from lorascope.training.state import seed_generators

Model = str | Callable[[], nn.Module]
Data = Task | str | Path


@dataclass(frozen=True)
class IsolatedRun:
    """Arguments of an isolated run, which is measured, with the meaning they have in ``train``.

    Only the first phase of a method is measured. ``model`` is a name for ``models.load``, or a function that returns a
    fresh model. The run folder is ``out``, by default ``<root>/<name>-<method>-<id>`` with the device at the end unless
    it is the CPU. The peak of memory is measured only on "cpu" and "cuda", and is NA elsewhere.
    """

    model: Model
    data: Data
    method: Method
    settings: Settings
    seed: int = 0
    out: str | Path | None = None
    root: str | Path = "runs"
    overwrite: bool = False
    device: str = "cpu"

    @classmethod
    def of(
        cls, model: Model, data: Data, method: Method | str, settings: Mapping[str, Any], **where: Any
    ) -> IsolatedRun:
        """Create the arguments with the method's own learning rates and a minimal evaluation."""
        if isinstance(method, str):
            method = from_config({"name": method})
        asked = {"lr": method.lr, "head_lr": method.head_lr, "eval_size": 1, "test_size": 1} | dict(settings)
        return cls(model, data, method, Settings(**asked), **where)

    def run(
        self,
        name: str,
        take: Callable[[Any], None],
        observers: tuple[Observer, ...] = (),
        session: type[Session] = Session,
    ) -> Path:
        """Measure in this process, and return the run folder.

        ``take`` runs the steps of the session it receives; ``name``, the kind of measurement, is part of the run id.
        """
        task = self.data
        if not isinstance(task, Task):
            task = tasks.load(str(task))
        living = models.load(self.model, task=task) if isinstance(self.model, str) else self.model()
        set_dtype(living, self.settings.dtype)
        _own_tensors(living, self.device)
        task = task.fit(living)
        self.settings.set_computation(living)
        mark = prepare_model(living, task, self.seed, self.settings.quantize, self.device)
        base = LiveWeights(living)
        phase = replace(next(self.method.phases(base)), name=name)
        plan = RunSpec(self.method, phase, task, self.settings, self.seed, mark.w0_hash, observers)
        plan = replace(plan, weight_parts=target_parts(phase.method, living))
        folder_name = f"{name}-{self.method.name}-{plan.id}"
        if self.device != "cpu":
            folder_name += f"-{self.device.replace(':', '-')}"
        folder = Path(self.out or Path(self.root, folder_name))
        prepare_folder(folder, plan.id, self.overwrite)
        finished = finished_run(folder, plan)
        if finished is None:
            with lock_run(folder), seed_generators(self.seed):
                begun = session(living, plan, base, folder, [], self.device)
                take(begun)
                begun.writer.meta.seconds = begun.writer.meta.total_seconds = begun.seconds
                begun.writer.finish("done")
        elif (device := finished.meta.device) != self.device:  # the id is the same on every device, the memory is not
            raise ValueError(
                f"cannot reuse {folder}: it was measured on {device}, not on {self.device}. "
                "Pass another folder or overwrite=True"
            )
        return folder


def run_in_own_process(
    work: Callable[[IsolatedRun], Path], model: Model, data: Data, method: Method | str, **options: Any
) -> Run:
    """Run ``work`` on an ``IsolatedRun`` in a fresh process, and return the run that it writes.

    The options are fields of ``IsolatedRun`` and settings of ``train``, such as ``batch_size``.
    """
    where = {key: options.pop(key) for key in ("seed", "out", "root", "overwrite", "device") if key in options}
    # The processes of loky are not forks, so they have no tensors of this process; its pickles include local functions.
    with ProcessPoolExecutor(max_workers=1) as fresh:
        return Run.read(fresh.submit(work, IsolatedRun.of(model, data, method, options, **where)).result())


def _own_tensors(model: nn.Module, device: str) -> None:
    """Allocate all tensors of a model again: some loaders map them from a file, which no allocator counts."""
    model.to(device)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


class LiveWeights(Base):
    """Base weights of an isolated run, without the copies that lorascope makes for its own records.

    A parameter that trains therefore has its current value, not its initial one.
    """

    def capture(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy no weights."""
