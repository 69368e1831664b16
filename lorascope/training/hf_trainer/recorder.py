"""transformers' Trainer: our methods under it, and a recorder of whatever it trains."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorascope.adapters.peft_layers import unwrap_peft_model
from lorascope.files.printable import printable
from lorascope.methods.base import Method, Step, task_head
from lorascope.observe import Observer, norms
from lorascope.observe.trainable import unreadable_adapters
from lorascope.schema import module_table
from lorascope.schema.records import Record
from lorascope.training.base_weights import Base
from lorascope.training.hf_trainer.method_callback import (
    MethodCallback,
    driver_of,
    read_checkpoint_file,
    refuse_sharded,
    step_of,
    unwrap_optimizer,
    write_checkpoint_file,
)
from lorascope.training.hf_trainer.run_folder import Recording
from lorascope.training.hf_trainer.run_metadata import describe_run, overlap
from lorascope.training.settings import Settings

FILE = "lorascope-recorder.safetensors"


def trainer_kwargs(
    method: Method, model: nn.Module, lr: float | None = None, clip: float | None = 1.0
) -> dict[str, Any]:
    """Attach a method to a model, and give what a Trainer needs to train it.

    The schedule is the Trainer's. Rate and clipping are not: ``max_grad_norm`` must be 0, since the Trainer clips
    before a method has edited the gradients, and ``learning_rate`` and ``weight_decay`` are not asked. Factors are
    drawn from the global generator, so seed it first (``transformers.set_seed``).

    Parameters
    ----------
    method : Method
        Of one phase, which needs no batch, loss or held-out text of its own: Full, LoRA, AdaLoRA, FourierFT, HydraLoRA,
        LISA, Adapprox, and NeFT with ``neurons``.
    model : Module
        Freshly loaded; changed in place. Of a classifier ``accepts_loss_kwargs`` is set to False: its loss is a mean
        over rows, which the Trainer would else not divide by the number of accumulated parts.
    lr : float, optional
        The method's by default.
    clip : float or None
        Largest norm of all trained gradients together.

    Returns
    -------
    dict
        ``optimizers`` and ``callbacks``, for ``Trainer(model, args, ..., **trainer_kwargs(method, model))``.

    Raises
    ------
    ValueError
        The method needs more than a Trainer gives, or the model carries adapters already.
    """
    settings = Settings(steps=1, lr=method.lr if lr is None else lr, head_lr=method.head_lr, clip=clip)
    callback = MethodCallback(method, model, settings)
    if task_head(model):
        model.accepts_loss_kwargs = False  # type: ignore[assignment]
    return {"optimizers": (callback.optimizer, None), "callbacks": [callback]}


class TrainerRecorder(TrainerCallback):
    """Records what a Trainer trains, as ``train`` does: ``Trainer(..., callbacks=[TrainerRecorder()])``.

    It looks on alone: weights are the same to the bit with it and without. PEFT's adapters are read as ``deltas`` reads
    them; a method of ``trainer_kwargs`` records its own decisions. Under DDP the first process writes. The folder can
    be opened by ``load`` all the while: rows reach it every 30 seconds.

    Parameters
    ----------
    out : path, optional
        The run folder; ``lorascope`` in the Trainer's ``output_dir`` by default. A run that lies there is moved aside,
        unless the Trainer goes on with it.
    observe : sequence of Observer, optional
        ``[observe.norms()]`` by default. Held-out text is none of what a Trainer shows, so ``neurons`` and
        ``utilization`` are refused.
    """

    def __init__(self, out: str | Path | None = None, observe: Sequence[Observer] | None = None) -> None:
        self.out = None if out is None else Path(out)
        self.observers = (norms(),) if observe is None else tuple(observe)
        self._recording: Recording | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Open the folder, and look at the state before the first step."""
        driver = self._driver = driver_of(trainer["model"])
        optimizer = self._optimizer = unwrap_optimizer(trainer["optimizer"])
        if driver is None:
            refuse_sharded(trainer["model"], trainer["optimizer"])
            step, base = _observed_step(unwrap_peft_model(trainer["model"]), optimizer, state)
        else:
            driver.on_train_begin(args, state, control, **trainer)
            step, base = driver.step, driver.base
        before = read_checkpoint_file(args, state, FILE, optimizer) if state.global_step else None
        if not state.is_world_process_zero:
            return
        if self._recording is not None:
            self._recording.mark_interrupted()
        _warn_unreadable(step.model)
        meta = describe_run(args, state, trainer, step, driver, self.observers)
        meta["id"] = before["id"] if before else secrets.token_hex(6)
        path = self.out or Path(str(args.output_dir)) / "lorascope"
        method = None if driver is None else driver.method
        self._recording = Recording(path, meta, step, base, method, self.observers, before)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Look at a step, while its gradients are there."""
        if self._driver is not None:
            self._driver.on_optimizer_step(args, state, control, **trainer)
        if (recording := self._recording) is None:
            return
        recording.step.index = state.global_step
        norm = None if self._driver is None else self._driver.norm
        recording.look({"lr": self._optimizer.param_groups[0]["lr"], "grad_norm": norm})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Keep the last state, once every callback has done its work: PEFT's allocator, called by one, masks then."""
        if self._recording is not None and self._recording.step.last:
            self._recording.attempt(self._recording.save_final_state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **trainer: Any
    ) -> None:
        """Take the loss, a mean over the steps since the last log, and the gradient norm, where none is our own."""
        if self._recording is not None and "loss" in logs:
            own = [Record(name, float(logs[name])) for name in ("loss", "grad_norm") if name in logs]
            self._recording.add(own)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **trainer: Any
    ) -> None:
        """Take the loss, the metric that ``metric_for_best_model`` names, and how many rows are training rows."""
        if self._recording is None:
            return
        seen, shown = trainer.get("train_dataloader"), trainer.get("eval_dataloader")
        if seen is not None and shown is not None:
            self._recording.writer.meta["eval_overlap"] = overlap(seen.dataset, shown.dataset)
        chosen = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        kept = {"eval_loss": metrics.get("eval_loss")}
        if chosen != "eval_loss":
            kept["eval_metric"] = metrics.get(chosen)
        self._recording.add(Record(name, float(value)) for name, value in kept.items() if value is not None)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any) -> None:
        """Put the recorder's state beside the Trainer's checkpoint."""
        if (recording := self._recording) is not None:
            recording.attempt(lambda: write_checkpoint_file(args, state, FILE, self._optimizer, recording.state()))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Where training stops early keep the state, before the Trainer may put back the best one."""
        if self._recording is not None and control.should_training_stop and not self._recording.step.last:
            self._recording.attempt(self._recording.save_final_state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """Close the folder."""
        if self._recording is not None:
            self._recording.attempt(self._recording.finish)
            self._recording = None


def _warn_unreadable(model: nn.Module) -> None:
    """One line of warning for adapters that cannot be recorded; the training is not theirs to stop."""
    found = list(unreadable_adapters(model).items())
    if found:
        module, kind = found[0]
        more = f"; nor {len(found) - 1} more" if len(found) > 1 else ""
        told = f"the adapter of {printable(module)}, a {kind}, whose update is no matrix{more}"
        warnings.warn(f"not recorded: {told}", stacklevel=2)


def _observed_step(model: nn.Module, optimizer: Any, state: TrainerState) -> tuple[Step, Base]:
    """What observers see where no method of ours trains; what lies there now counts as W_0."""
    base = Base(model)
    base.capture(optimizer)
    step = step_of(model, optimizer, base, module_table.describe(model))
    step.index, step.total = state.global_step - 1, state.max_steps
    return step, base
