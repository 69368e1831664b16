"""Recorder of a training in the user's own loop."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.adapters.peft_layers import unwrap_peft_model
from lorascope.files.printable import printable
from lorascope.methods.base import Step
from lorascope.observe import Observer, norms
from lorascope.observe.trainable import unreadable_adapters
from lorascope.runs.manifest import Manifest
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.records import Record
from lorascope.training.base_weights import Base
from lorascope.training.foreign_loop import (
    class_names,
    describe_recipe,
    peft_task_type,
    reject_distributed_stop,
    step_of,
    unwrap_optimizer,
    warn_unreadable,
)
from lorascope.training.report import Report
from lorascope.training.run_folder import Recording
from lorascope.training.run_spec import circumstances
from lorascope.training.sharded_weights import WholeWeights, is_first_process, reject_sharded_weights, whole_number
from lorascope.training.state import trained_parameters
from lorascope.training.trackers import TrackerReport, tracker_names


def record(
    model: nn.Module,
    optimizer: Any,
    out: str | Path,
    observe: Sequence[Observer] | None = None,
    *,
    steps: int | None = None,
    seed: int | None = None,
    task: str | None = None,
    report_to: str | Sequence[str] | None = None,
) -> LoopRecorder:
    """Record a training in any PyTorch loop, as ``TrainerRecorder`` does under a Trainer.

    Call it after everything that replaces parameters (``get_peft_model``, ``accelerator.prepare``) and before the first
    step, because W_0 is the model at this call. It records passively: the weights are bitwise equal with and without
    it. Only active PEFT adapters are recorded. Under DDP the first process writes. So it does under FSDP2, where every
    process must make the same calls, and the first one keeps whole weights in CPU memory.

    Parameters
    ----------
    model : Module
        Model in training: full, or with adapters of PEFT or ``attach``. Wrappers of ``torch.compile``, DDP and
        ``accelerate`` are allowed.
    optimizer : Optimizer
        Optimizer of the model's parameters, or accelerate's wrapper around it.
    out : path
        Run folder. Another run in it is moved aside.
    observe : sequence of Observer, optional
        Observers; ``[observe.norms()]`` by default. ``neurons`` and ``utilization`` are rejected: no held-out text.
    steps : int, optional
        Planned number of optimizer steps. If it is known, the last step is recorded and its state is saved at that
        step, while its gradients exist; by default this is done by ``close``.
    seed : int, optional
        Seed of the training, by which figures distinguish runs that they average.
    task : str, optional
        Name of the data.
    report_to : str or sequence of str, optional
        Trackers that show the values of the training, as in ``train``.

    Returns
    -------
    LoopRecorder
        Recorder whose ``step`` is called after every optimizer step; a context manager.

    Raises
    ------
    ValueError
        The weights are sharded by ZeRO-3 or the first version of FSDP, the optimizer does not train the model, ``out``
        contains files but no run, or a tracker is not installed or cannot start.

    Examples
    --------
    >>> with ls.record(model, optimizer, out="runs/mine") as recorder:  # doctest: +SKIP
    ...     for batch in batches:
    ...         loss = model(**batch).loss
    ...         loss.backward()
    ...         optimizer.step()
    ...         recorder.step(loss=loss)
    ...         optimizer.zero_grad()
    """
    trackers = tracker_names(report_to)
    report = TrackerReport(trackers) if trackers else None
    observers = (norms(),) if observe is None else observe
    return LoopRecorder(model, optimizer, Path(out), observers, steps, seed, task, report)


class LoopRecorder:
    """Recorder of a training in any loop; ``record`` returns it.

    ``load`` can open the folder during training, and new rows are written every 30 seconds. An exception in a ``with``
    block marks the run as broken. Without ``close``, its status stays "running".
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        out: Path,
        observers: Sequence[Observer],
        steps: int | None,
        seed: int | None,
        task: str | None,
        report: Report | None,
    ) -> None:
        optimizer, model = unwrap_optimizer(optimizer), _unwrap_model(model)
        _check(model, optimizer, steps)
        reject_distributed_stop(observers)
        bare_model = unwrap_peft_model(model)
        self._pending, self._closed = _PendingStep(), False
        self._weights = WholeWeights(model, optimizer, observers)
        self._recording: Recording | None = None
        device = str(next(model.parameters()).device)
        with self._weights.in_place():
            base = Base(bare_model)
            self._step = step_of(bare_model, optimizer, base, module_table.describe(bare_model), "in your own loop")
            self._step.total = -1 if steps is None else steps
            if is_first_process():
                base.capture(optimizer)
                warn_unreadable(bare_model)
                meta = _describe(model, self._step, observers, seed, task, device)
                self._recording = Recording(out, meta, self._step, None, observers, None, lost=None, report=report)
        self._hook = optimizer.register_step_post_hook(self._pending)

    def step(self, loss: float | Tensor | None = None, grad_norm: float | Tensor | None = None) -> None:
        """Record one optimizer step; call it after the step and before the gradients are reset.

        A call is ignored if the optimizer has not stepped since the last one: between the micro-batches of an
        accumulated gradient in accelerate, or when ``GradScaler`` skips a step. The step axis counts the other calls.

        Parameters
        ----------
        loss : float or tensor, optional
            Loss of the step's batch. A tensor is copied to the host.
        grad_norm : float or tensor, optional
            Global gradient norm before clipping, as ``clip_grad_norm_`` returns it.
        """
        recording, lr, step = self._recording, self._pending.lr, self._step
        if self._closed or lr is None:
            return
        self._pending.lr = None
        step.index += 1
        values = whole_number(loss), whole_number(grad_norm)
        if self._weights.due(step):
            self._weights.gather()
        if recording is None:
            return
        settings = recording.writer.meta.settings
        settings["steps"] = max(settings["steps"], step.finished)
        with self._weights.in_place():
            recording.record(*values, lr)
            if step.last:
                recording.attempt(recording.save_final_state)

    @property
    def stopped(self) -> bool:
        """Whether an observer, such as ``alarms(stop=...)``, asks to stop: leave the loop. False in other processes."""
        return bool(self._step.stop)

    def evaluate(self, loss: float | Tensor | None = None, metric: float | Tensor | None = None) -> None:
        """Record the loss and the metric of a validation after the current step."""
        values = {"eval_loss": whole_number(loss), "eval_metric": whole_number(metric)}
        if self._recording is not None:
            self._recording.add(Record(name, value) for name, value in values.items() if value is not None)

    def close(self) -> Run | None:
        """Save the final state and close the run folder.

        Returns
        -------
        Run or None
            The finished run; None in other processes than the first, and if the recorder is already closed.
        """
        return self._end(None)

    def _end(self, error: str | None) -> Run | None:
        recording, self._recording = self._recording, None
        if self._closed:
            return None
        self._closed = True
        self._hook.remove()
        if error is None and not self._step.last:
            self._weights.gather()
        if recording is None:
            return None
        if error is None:
            with self._weights.in_place():
                return recording.attempt(recording.finish)
        recording.writer.meta.error = error
        return recording.attempt(lambda: recording.close("broken"))

    def __enter__(self) -> LoopRecorder:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._end(None if error is None else _first_line(error))


class _PendingStep:
    """Hook of an optimizer that stores the learning rate of its last step until the recorder takes it."""

    lr: float | None = None

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # GradScaler calls a fused optimizer even if gradients overflow, and it skips the update itself.
        if not bool(getattr(optimizer, "found_inf", False)):
            self.lr = float(optimizer.param_groups[0]["lr"])


def _check(model: nn.Module, optimizer: Any, steps: int | None) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be >= 1 or None, got {steps}")
    reject_sharded_weights(model, gathered=True)
    known = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in known for parameter in trained_parameters(optimizer)):
        raise ValueError(
            "cannot record an optimizer that trains no parameter of the model: create it after get_peft_model, and "
            "pass the results of accelerator.prepare"
        )


def _unwrap_model(model: Any) -> nn.Module:
    """Return the model inside the wrappers of ``torch.compile`` and of data parallelism."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _describe(
    model: nn.Module, step: Step, observers: Sequence[Observer], seed: int | None, task: str | None, device: str
) -> Manifest:
    """Return the content of ``run.json``."""
    known = {id(parameter) for parameter in model.parameters()}
    trained = [p for p in trained_parameters(step.optimizer) if p.requires_grad and id(p) in known]
    recipe, label = describe_recipe(model, step, "loop")
    group = step.optimizer.param_groups[0]
    return Manifest(
        id=secrets.token_hex(6),
        started=time.time_ns(),
        method=recipe,
        recipe=recipe,
        label=label,
        phase=["", "train"],
        task_type=peft_task_type(model),
        task_kind="image" if getattr(step.model, "main_input_name", None) == "pixel_values" else None,
        left_out=unreadable_adapters(step.model),
        task=task,
        labels=class_names(step),
        settings={
            "steps": max(step.total, 0),
            "lr": float(group.get("initial_lr", group["lr"])),
            "weight_decay": float(group.get("weight_decay", 0.0)),
            "observers": [observer.config() for observer in observers],
        },
        seed=seed,
        **circumstances(step, None, trained, device),
    )


def _first_line(error: BaseException) -> str:
    return printable(traceback.format_exception_only(error)[0].partition("\n")[0])
