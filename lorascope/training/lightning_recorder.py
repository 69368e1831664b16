"""Recorder of a training under Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lorascope.methods.field_checks import default_if_none
from lorascope.observe import Observer, norms
from lorascope.training.any_loop import LoopRecorder
from lorascope.training.curve_report import HostReport


class LoggerReport(HostReport):
    """Report of the Lightning recorder to the loggers of a Trainer."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        super().__init__()
        self.loggers = loggers

    def send_to_host(self, values: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            self.attempt(type(logger).__name__, partial(logger.log_metrics, values, step))


class LightningRecorder(Callback):
    """Recorder of a training under Lightning, as by ``record``: ``Trainer(..., callbacks=[LightningRecorder()])``.

    Each ``fit`` starts a new run, also if it resumes from a checkpoint. The loss of a step is the mean over its
    micro-batches. Manual optimization is rejected.

    Parameters
    ----------
    out : path, optional
        Run folder; ``lorascope`` in ``default_root_dir`` by default. Another run in it is moved aside.
    observe : sequence of Observer, optional
        Observers; ``[observe.norms()]`` by default.
    model : str
        Attribute of the LightningModule that contains the model, such as a ``PeftModel``; by default the
        LightningModule is recorded.
    seed : int, optional
        Seed of the training.
    report : bool
        Send the recorded values, pooled by layer and role, to the loggers of the Trainer, as ``lorascope/...``.

    Attributes
    ----------
    recorder : LoopRecorder or None
        Recorder during ``fit``, whose ``evaluate`` records the result of a validation.

    Raises
    ------
    ValueError
        When training starts: the module optimizes manually, or ``record`` rejects it.
    """

    def __init__(
        self,
        out: str | Path | None = None,
        observe: Sequence[Observer] | None = None,
        *,
        model: str = "",
        seed: int | None = None,
        report: bool = False,
    ) -> None:
        self.out, self.observe, self.model, self.seed, self.report = out, observe, model, seed, report
        self.recorder: LoopRecorder | None = None
        self._loss: float | Tensor = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the run folder, and record the state before the first step."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "cannot record manual optimization: call ls.record and recorder.step in the module instead"
            )
        out = Path(trainer.default_root_dir) / "lorascope" if self.out is None else self.out
        steps = trainer.max_steps if trainer.max_steps > 0 else None
        model = pl_module.get_submodule(self.model)
        observers = default_if_none(self.observe, (norms(),))
        report = LoggerReport(trainer.loggers) if self.report else None
        self.recorder = LoopRecorder(model, trainer.optimizers[0], Path(out), observers, steps, self.seed, None, report)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Start the sum of the losses of the micro-batches."""
        self._loss = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a step while its gradients still exist; Lightning has divided the loss by the number of batches."""
        if self.recorder is not None and outputs:
            self._loss = self._loss + outputs["loss"]
            self.recorder.step(loss=self._loss)
            trainer.should_stop |= self.recorder.stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state and close the run folder."""
        self._end(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Mark the run as broken."""
        self._end(exception)

    def _end(self, error: BaseException | None) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(type(error), error, None)
        self.recorder = None
