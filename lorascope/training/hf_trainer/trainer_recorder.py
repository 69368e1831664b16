"""Recorder of a training under transformers' Trainer."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorascope.adapters.peft_layers import unwrap_peft_model
from lorascope.inputs.tasks import Task
from lorascope.observe import Observer
from lorascope.schema import module_table
from lorascope.schema.records import Record
from lorascope.training.base_weights import Base
from lorascope.training.foreign_loop import (
    foreign_observers,
    reject_distributed_stop,
    step_of,
    unwrap_optimizer,
    warn_unreadable,
)
from lorascope.training.hf_trainer.method_callback import (
    LOOP,
    MARKER,
    MethodCallback,
    read_checkpoint_file,
    reject_sharded,
    write_checkpoint_file,
)
from lorascope.training.hf_trainer.run_metadata import describe_run, row_overlap
from lorascope.training.hf_trainer.step_loss import observe_losses, running_trainer, step_loss
from lorascope.training.hf_trainer.trainer_report import TrainerReport, reporting_callbacks
from lorascope.training.run_folder import ForeignRecording

FILE = "lorascope-recorder.safetensors"


class TrainerRecorder(TrainerCallback):
    """Recorder of a Trainer's training, as in ``train``: ``Trainer(..., callbacks=[TrainerRecorder()])``.

    It records passively: the weights are bitwise equal with and without it. PEFT's adapters are read as by ``deltas``,
    and a method of ``trainer_kwargs`` records its own decisions. Under DDP the first process writes. ``load`` can open
    the folder during training, and new rows are written every 30 seconds, less often if writing takes more than 1% of
    the time.

    Parameters
    ----------
    out : path, optional
        Run folder; ``lorascope`` in ``output_dir`` by default. Another run in it is moved aside.
    observe : sequence of Observer, optional
        Observers; ``[observe.norms()]`` by default. ``neurons`` and ``utilization`` are rejected: no held-out text.
    report : bool
        Send the recorded values, pooled by layer and role, to the ``report_to`` of the Trainer, as ``lorascope/...``.
    kl : str, path or Task, optional
        Text on which the model should stay as it was: adds ``observe.kl(keep=kl)`` to the observers.
    """

    def __init__(
        self,
        out: str | Path | None = None,
        observe: Sequence[Observer] | None = None,
        *,
        report: bool = False,
        kl: str | Path | Task | None = None,
    ) -> None:
        self.out = None if out is None else Path(out)
        self.observers = foreign_observers(observe, kl)
        self.report = report
        self._recording: ForeignRecording | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **trainer: Any) -> None:
        """Open the run folder, and record the state before the first step."""
        callback: MethodCallback | None = getattr(trainer["model"], MARKER, None)
        self._method_callback = callback
        reject_distributed_stop(self.observers)
        optimizer = self._optimizer = unwrap_optimizer(trainer["optimizer"])
        if callback is None:
            reject_sharded(trainer["model"], trainer["optimizer"])
            model = unwrap_peft_model(trainer["model"])
            base = Base(model)
            base.capture(optimizer)
            step = step_of(model, optimizer, base, module_table.describe(model), LOOP)
            step.index, step.total = state.global_step - 1, state.max_steps
        else:
            # The Trainer may call the recorder first, which needs the restored state of the method.
            callback.on_train_begin(args, state, *_, **trainer)
            step = callback.step
        self._losses = observe_losses(running_trainer())
        # In all processes, so that none waits for one that raised an error.
        before = read_checkpoint_file(args, state, FILE, optimizer) if state.global_step else None
        if not state.is_world_process_zero:
            return
        if self._recording is not None:
            self._recording.mark_interrupted()
        warn_unreadable(step.model)
        id = before["id"] if before else secrets.token_hex(6)
        meta = describe_run(args, state, trainer, step, callback, self.observers, id)
        path = self.out or Path(str(args.output_dir)) / "lorascope"
        method = getattr(callback, "method", None)
        report = TrainerReport(args, state, reporting_callbacks()) if self.report else None
        self._recording = ForeignRecording(path, meta, step, method, self.observers, before, report=report)
        self._recording.flush_report()

    def on_step_begin(self, *_: Any, **trainer: Any) -> None:
        """Forget the losses of the last step."""
        self._losses.clear()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Record a step while its gradients still exist, and end training if an observer asks for it."""
        if self._method_callback is not None:
            self._method_callback.on_optimizer_step(args, state, control, **trainer)
        loss = step_loss(self._losses)  # all processes take part
        if (recording := self._recording) is None:
            return
        recording.step.index = state.global_step
        norm = getattr(self._method_callback, "norm", None)
        recording.record(loss, norm, self._optimizer.param_groups[0]["lr"])
        control.should_training_stop |= bool(recording.step.stop)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **trainer: Any) -> None:
        """Save the state of the last step, after callbacks that change it, such as one that calls PEFT's allocator.

        The report is sent here, because the Trainer has counted the step.
        """
        if (recording := self._recording) is None:
            return
        if recording.step.last:
            recording.attempt(recording.save_final_state)
        recording.flush_report()

    def on_log(self, args: TrainingArguments, *_: Any, logs: Any = None, **trainer: Any) -> None:
        """Record the gradient norm unless the method has recorded one, and the loss of a Trainer without losses."""
        if self._recording is not None and "loss" in logs:
            self._recording.add([Record(name, float(logs[name])) for name in ("loss", "grad_norm") if name in logs])

    def on_evaluate(self, args: TrainingArguments, *_: Any, metrics: Any = None, **trainer: Any) -> None:
        """Record the loss, the metric of ``metric_for_best_model``, and the fraction of rows that are training rows."""
        if self._recording is None:
            return
        trained, evaluated = trainer.get("train_dataloader"), trainer.get("eval_dataloader")
        if trained is not None and evaluated is not None:
            self._recording.writer.meta.eval_overlap = row_overlap(trained.dataset, evaluated.dataset)
        metric = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        keys = {"eval_loss": "eval_loss"}
        if metric != "eval_loss":  # by which the Trainer selects the best state unless the user names a metric
            keys["eval_metric"] = metric
        self._recording.add(
            Record(name, float(metrics[key])) for name, key in keys.items() if metrics.get(key) is not None
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **trainer: Any) -> None:
        """Write the recorder's state into the Trainer's checkpoint."""
        if (recording := self._recording) is not None:
            recording.attempt(lambda: write_checkpoint_file(args, state, FILE, self._optimizer, recording.state()))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Save the state if training stops early, before the Trainer may load the best one."""
        if self._recording is not None and control.should_training_stop and not self._recording.step.last:
            self._recording.attempt(self._recording.save_final_state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **trainer: Any) -> None:
        """Close the run folder."""
        if self._recording is not None:
            self._recording.attempt(self._recording.finish)
            self._recording = None
