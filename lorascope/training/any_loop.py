"""Recorder of a training in the user's own loop."""

from __future__ import annotations

import operator
import secrets
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.adapters.peft_layers import unwrap_peft_model
from lorascope.files.printable import printable
from lorascope.inputs.tasks import Task
from lorascope.methods.field_checks import default_if_none, is_integer
from lorascope.methods.method import Step, trained_parameters
from lorascope.observe import Observer
from lorascope.observe.observer import require_observers
from lorascope.runs.manifest import Manifest
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.training.base_weights import Base
from lorascope.training.curve_report import CurveReport
from lorascope.training.foreign_loop import (
    describe_recipe,
    foreign_observers,
    reject_distributed_stop,
    run_manifest,
    step_of,
    unwrap_optimizer,
    warn_unreadable,
)
from lorascope.training.recording import run_records
from lorascope.training.run_folder import ForeignRecording
from lorascope.training.sharded_weights import WholeWeights, is_first_process, reject_sharded_weights, whole_number
from lorascope.training.trackers import tracker_names, tracker_report

UNSTEPPED = 100  # calls without an optimizer step: more than most trainings accumulate
_CLOSED = "the recorder is closed; open another one with ls.record"


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
    kl: str | Path | Task | None = None,
) -> LoopRecorder:
    """Record a training in any PyTorch loop, as ``TrainerRecorder`` does under a Trainer.

    Call it after everything that replaces parameters (``get_peft_model``, ``accelerator.prepare``) and before the first
    step, because W_0 is the model at this call. It records passively: the weights are bitwise equal with and without
    it. The PEFT adapters that are active now are recorded. Under DDP the first process writes, also under FSDP2,
    where every process must make the same calls, and the first one keeps whole weights in CPU memory.

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
    kl : str, path or Task, optional
        Text on which the model should stay as it was: adds ``observe.kl(keep=kl)`` to the observers.

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
    report = tracker_report(tracker_names(report_to))
    observers = foreign_observers(observe, kl)
    return LoopRecorder(model, optimizer, Path(out), observers, steps, seed, task, report)


class LoopRecorder:
    """Recorder of a training in any loop; ``record`` returns it.

    ``load`` can open the folder during training, and new rows are written every 30 seconds, less often if writing takes
    more than 1% of the time. An exception in a ``with`` block marks the run as broken. Without ``close``, its status
    stays "running". What would leave gaps in the records, such as a replaced optimizer, raises a warning.
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
        report: CurveReport | None,
    ) -> None:
        self._gradients = getattr(optimizer, "gradient_state", None)  # of accelerate
        optimizer, model = unwrap_optimizer(optimizer), _unwrap_model(model)
        _check(model, optimizer, steps, observers, seed, task)
        reject_distributed_stop(observers)
        bare_model = unwrap_peft_model(model)
        self._closed = False
        self._done = _DoneSteps(optimizer)
        self._losses: list[float] = []  # of the micro-batches since the last step
        self._warned: set[str] = set()
        self._weights = WholeWeights(model, optimizer, observers)
        self._recording: ForeignRecording | None = None
        device = str(next(model.parameters()).device)
        with self._weights.in_place():
            base = Base(bare_model)
            self._step = step_of(bare_model, optimizer, base, module_table.describe(bare_model), "in your own loop")
            self._step.total = default_if_none(steps, -1)  # no step is the last one
            if is_first_process():
                base.capture(optimizer)
                warn_unreadable(bare_model)
                meta = _describe(model, self._step, observers, seed, task, device)
                self._recording = ForeignRecording(
                    out, meta, self._step, None, observers, None, lost=None, report=report
                )
        self._hook = optimizer.register_step_post_hook(self._done)

    def step(self, loss: float | Tensor | None = None, grad_norm: float | Tensor | None = None) -> None:
        """Record one optimizer step; call it after the step and before the gradients are reset.

        A call is ignored if the optimizer has not stepped since the last one: between the micro-batches of an
        accumulated gradient in accelerate, or when ``GradScaler`` skips a step. The step axis counts the other calls.

        Parameters
        ----------
        loss : float or tensor, optional
            Loss of the step's batch. A tensor is copied to the host. Under accelerate's ``accumulate`` it may be that
            of a micro-batch, and the mean over those of the step is recorded.
        grad_norm : float or tensor, optional
            Global gradient norm before clipping, as ``clip_grad_norm_`` returns it.

        Raises
        ------
        ValueError
            A value is not a number.
        """
        recording, done, step = self._recording, self._done, self._step
        # Before any return, because all processes have to take part in gathering a sharded value.
        loss_value, norm = whole_number("loss", loss), whole_number("grad_norm", grad_norm)
        if self._closed:
            self._warn("closed", _CLOSED)
            return
        if not done.steps:
            if self._gradients is None or self._gradients.sync_gradients or loss_value is None:
                self._losses.clear()  # of a step that GradScaler skipped
            else:
                self._losses.append(loss_value)
            done.empty_calls += 1
            if done.empty_calls == UNSTEPPED or done.have_weights_changed():
                self._warn_unstepped()
            return
        if done.steps > 1:
            self._warn_skipped()
        if (joined := len(trained_parameters(step.optimizer)) - done.number) > 0:
            problem = f"{joined} parameters have joined the optimizer since ls.record, and are not recorded"
            self._warn("joined", f"{problem}; call ls.record again to record them")
        lr = done.take()
        if loss_value is not None:
            self._losses.append(loss_value)
        mean_loss = fmean(self._losses) if self._losses else None
        self._losses.clear()
        step.index += 1
        if self._weights.due(step):
            self._weights.gather()
        if recording is None:
            return
        settings = recording.writer.meta.settings
        # The loop gave no number of steps, or trains beyond it.
        settings["steps"] = max(settings["steps"], step.finished)
        with self._weights.in_place():
            recording.record(mean_loss, norm, lr)
            if step.last:
                recording.attempt(recording.save_final_state)

    @property
    def stopped(self) -> bool:
        """Whether an observer, such as ``alarms(stop=...)``, asks to stop: leave the loop. False in other processes."""
        return bool(self._step.stop)

    def evaluate(self, loss: float | Tensor | None = None, metric: float | Tensor | None = None) -> None:
        """Record the loss and the metric of a validation after the current step; other values raise a ValueError."""
        values = {"eval_loss": whole_number("loss", loss), "eval_metric": whole_number("metric", metric)}
        if self._closed:
            self._warn("closed", _CLOSED)
        if self._recording is not None:
            self._recording.add(run_records(values))

    def close(self) -> Run | None:
        """Save the final state and close the run folder.

        Returns
        -------
        Run or None
            The finished run; None in other processes than the first, and if the recorder is already closed.
        """
        return self._end(None)

    def _end(self, error: BaseException | None) -> Run | None:
        recording, self._recording = self._recording, None
        if self._closed:
            return None
        self._closed = True
        self._hook.remove()
        if error is None and self._done.steps:
            self._warn_skipped()
        elif error is None and self._done.empty_calls and not self._step.finished:
            self._warn_unstepped()
        # All processes take part in this, also those without a recording.
        if error is None and not self._step.last:
            self._weights.gather()
        if recording is None:
            return None
        if error is None:
            with self._weights.in_place():
                return recording.attempt(recording.finish)
        recording.writer.meta.error = printable(traceback.format_exception_only(error)[0].partition("\n")[0])
        return recording.attempt(lambda: recording.close("broken"))

    def _warn_unstepped(self) -> None:
        number = self._done.empty_calls
        calls = "call" if number == 1 else f"{number} calls"
        fix = "pass the optimizer that trains the model to ls.record, after get_peft_model and accelerator.prepare"
        self._warn(
            "unstepped", f"the recorded optimizer has not stepped in the last {calls} of recorder.step; {fix}", 4
        )

    def _warn_skipped(self) -> None:
        times = "once" if self._done.steps == 1 else f"{self._done.steps} times"
        problem = f"the optimizer has stepped {times} since the last call of recorder.step"
        self._warn("skipped", f"{problem}, and the step axis counts the calls; call it after every optimizer step", 4)

    def _warn(self, problem: str, text: str, level: int = 3) -> None:
        """Warn of each problem once: a recorder must not stop training."""
        if problem not in self._warned:
            self._warned.add(problem)
            warnings.warn(text, stacklevel=level)

    def __enter__(self) -> LoopRecorder:
        if self._closed:
            raise ValueError(f"cannot record: {_CLOSED}")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._end(error)


class _DoneSteps:
    """Hook of an optimizer that counts its steps until the recorder takes them, and the calls that found none."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.number = len(trained_parameters(optimizer))
        self.steps, self.empty_calls, self._lr = 0, 0, 0.0
        self._versions = self._count_writes()

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # GradScaler calls a fused optimizer even if gradients overflow, and it skips the update itself.
        if not bool(getattr(optimizer, "found_inf", False)):
            self.steps, self._lr = self.steps + 1, float(optimizer.param_groups[0]["lr"])
        self._versions = self._count_writes()

    def take(self) -> float:
        """Forget the steps that were counted, and return the learning rate of the last one."""
        self.steps = self.empty_calls = 0
        return self._lr

    def have_weights_changed(self) -> bool:
        """Return whether anything but the optimizer has written to its parameters since its last step."""
        return self._count_writes() != self._versions

    def _count_writes(self) -> int:
        # torch counts the writes to a tensor in its version, and reading that needs no copy of the weights.
        return sum(map(operator.attrgetter("_version"), trained_parameters(self._optimizer)))


def _check(
    model: nn.Module,
    optimizer: Any,
    steps: int | None,
    observers: Sequence[Observer],
    seed: int | None,
    task: str | None,
) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if steps is not None and (not is_integer(steps) or steps < 1):
        raise ValueError(f"steps must be an integer >= 1 or None, got {steps!r}")
    require_observers(observers)
    if seed is not None and not is_integer(seed):
        raise ValueError(f"seed must be an integer or None, got {seed!r}")
    if task is not None and not isinstance(task, str):
        raise ValueError(f"task must be a string or None, got {task!r}")
    reject_sharded_weights(model, gathered=True)
    model_ids = set(map(id, model.parameters()))
    if model_ids.isdisjoint(map(id, trained_parameters(optimizer))):
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
    model_ids = set(map(id, model.parameters()))
    trained = [p for p in trained_parameters(step.optimizer) if p.requires_grad and id(p) in model_ids]
    recipe, label = describe_recipe(model, step, "loop")
    settings = {"steps": max(step.total, 0)}
    fields = {"id": secrets.token_hex(6), "task": task, "seed": None if seed is None else operator.index(seed)}
    return run_manifest(model, step, observers, None, recipe, label, trained, device, settings, **fields)
