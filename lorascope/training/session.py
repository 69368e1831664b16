"""State of a phase in training: the operations that the loop calls in each step, and saving and resuming."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorascope.adapters.delta import attached_deltas
from lorascope.files.printable import printable
from lorascope.inputs.models import processor
from lorascope.methods.base import Batch, HeldOut, Step, frozen_entries
from lorascope.observe import factors_of
from lorascope.observe.base import Observer
from lorascope.runs.manifest import State, Test
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema import module_table
from lorascope.schema.records import Item, Record
from lorascope.training.base_weights import Base
from lorascope.training.checkpoints import Best, Checkpoint, Checkpoints
from lorascope.training.evaluation import Score, evaluate
from lorascope.training.run_spec import Plan
from lorascope.training.state import (
    generators_state,
    load_generators_state,
    load_optimizer_state,
    load_tensors,
    optimizer_state,
    save_state,
    trained_tensors,
)


class Session:
    """State of one phase in training.

    Parameters
    ----------
    model : Module
        Base model whose head fits the task; trained in place.
    plan : Plan
        Specification of the phase.
    base : Base
        Base weights W_0.
    path : path
        Run folder.
    parents : list of Run
        Finished earlier phases.
    device : str
        Device of the model.
    """

    def __init__(self, model: nn.Module, plan: Plan, base: Base, path: Path, parents: list[Run], device: str) -> None:
        self.model, self.plan, self.path, self.device = model, plan, path, device
        self.settings, self.task = plan.settings, plan.task
        self.method = dataclasses.replace(plan.phase.method)
        self.observers = [dataclasses.replace(observer) for observer in plan.observers]
        modules = module_table.describe(model)
        self.method.attach(model)
        s = self.settings
        self.optimizer = self.method.optimizer(model, s.lr, s.head_lr, s.weight_decay)
        base.capture(self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, s.rate())
        self._encode(processor(model))
        self._search_generator = torch.Generator().manual_seed(plan.seed)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self.step = Step(
            -1,
            s.steps,
            model,
            self.optimizer,
            base,
            modules,
            self._batch_loss,
            self._draw_validation,
            self._held_out_batch,
        )
        self.best: Best | None = None
        self._clock, self._seconds_before = time.monotonic(), 0.0
        self.checkpoints = Checkpoints(path)
        frozen = frozen_entries(self.method)
        self.writer = RunWriter(path, self.plan.meta(model, self.trained, frozen, modules, parents, device))

    @property
    def name(self) -> str:
        """Name of the phase, or of the method if the phase has none."""
        return self.plan.phase.name or self.method.name

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that the optimizer may change."""
        return trained_parameters(self.optimizer)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent in this phase, including before it was resumed."""
        return self._seconds_before + time.monotonic() - self._clock

    # -- data ---------------------------------------------------------------------------------------------------

    def _encode(self, processor: Any) -> None:
        share, limits = float(self.method.search_share), self.settings

        def encode(splits: str, rows: int) -> Any:
            parts = [self.task.split(split, share) for split in splits.split("+")]
            # Rows of a task are sorted by a hash of their content, so the first ones are a random sample.
            return self.task.encode(processor, pd.concat(parts, ignore_index=True).head(rows), limits.max_length)

        everything = len(self.task.table)
        self.train = encode(self.plan.phase.split, everything)
        self.search = encode("search", everything) if share else None
        self.validation = encode("validation", limits.eval_size)
        self.test = encode("test", limits.test_size or everything)

    def batch(self, index: int) -> Batch:
        """Return the batch of a 0-based step. Each epoch visits the rows in a new seeded permutation."""
        size, total = self.settings.batch_size, len(self.train)
        positions = range(index * size, (index + 1) * size)
        return self._to_device(self.train.batch([int(self._epoch(p // total)[p % total]) for p in positions]))

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._permutation[0] != epoch:
            order = np.random.default_rng([self.plan.seed, epoch]).permutation(len(self.train))
            self._permutation = (epoch, order)
        return self._permutation[1]

    def _draw_validation(self, size: int | None, fixed: bool) -> Batch:
        if self.search is None:
            name, share = type(self.method).__name__, self.method.search_share
            raise ValueError(f"search_share of {name} must be > 0 to draw from the search split, got {share}")
        size = min(size or self.settings.batch_size, len(self.search))
        rows = range(size) if fixed else torch.randperm(len(self.search), generator=self._search_generator)[:size]
        return self._to_device(self.search.batch([int(row) for row in rows]))

    def _held_out_batch(self, size: int | None) -> HeldOut:
        rows = range(len(self.validation))[:size]
        groups = None if self.validation.groups is None else self.validation.groups[:size]
        return HeldOut(self._to_device(self.validation.batch(rows)), groups)

    def _to_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.device) for key, value in batch.items()}

    # -- loss and evaluation ------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context of bf16 autocast, or an empty one for fp32."""
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16)

    def _batch_loss(self, model: nn.Module, batch: Batch, params: Mapping[str, Tensor] | None) -> Tensor:
        with self.autocast():
            if params is None:
                return model(**batch).loss.float()
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return functional_call(model, {**buffers, **params}, (), batch).loss.float()

    def backward(self) -> float:
        """Compute the gradients of the step's batch, in ``accumulate`` micro-batches, and return its loss."""
        parts = self.settings.accumulate
        total = self.task.count_targets(self.step.batch)
        rows = self.settings.batch_size // parts
        loss = 0.0
        for part in range(parts):
            piece = {key: value[part * rows : (part + 1) * rows] for key, value in self.step.batch.items()}
            share = self.task.count_targets(piece) / total if parts > 1 else 1.0
            value = self._batch_loss(self.model, piece, None) * share
            value.backward()
            loss += float(value.detach())
        return loss

    def clip(self) -> float | None:
        """Clip the global norm of the gradients; see ``clip_gradients``."""
        return clip_gradients(self.optimizer, self.settings.clip)

    def evaluate(self) -> Score | None:
        """Evaluate on the validation split if the step is due; mark the best step so far and save its state.

        Step 0 is never the best, because nothing was trained. Returns None between evaluations.
        """
        step = self.step
        step.best = False
        if step.finished % self.settings.evaluation_steps and not step.last:
            return None
        score = self._score(self.validation)
        self.writer.add(step.finished, [Record("eval_loss", score.loss), Record("eval_metric", score.metric)])
        key = (score.metric if score.higher_is_better else -score.metric, -score.loss)
        if step.finished and self.method.settled(step) and (self.best is None or key > self.best.key):
            step.best = True
            if not step.last:  # finish() saves the last state
                self._save_state(self.checkpoints.best_file(step.finished))
            self.best = Best(key=key, **vars(self._state_entry()))
        return score

    def _score(self, rows: Any) -> Score:
        self.model.eval()
        with self.autocast():
            score = evaluate(self.model, rows, self.device)
        self.model.train()
        return score

    # -- records ------------------------------------------------------------------------------------------------

    def record(self, loss: float | None = None, norm: float | None = None, rate: float | None = None) -> None:
        """Record the values of the loop, the method and the observers in this step."""
        own = {"loss": loss, "grad_norm": norm, "lr": rate, "seconds": self.seconds}
        records = [Record(name, value) for name, value in own.items() if value is not None]
        items = merge_records(self.step, [*records, *self.method.records(self.step)], self.observers)
        self.writer.add(self.step.finished, items)

    # -- saving and resuming ------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Start, or resume from the newest intact checkpoint; return the 0-based step to run next."""
        self.model.train()
        found = self.checkpoints.newest()
        if found is None:
            self.writer.begin(None)
            if self.settings.eval_every != 0:
                self.evaluate()
            self.record()
            return 0
        checkpoint, table = found
        try:
            self._load_checkpoint(checkpoint)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"cannot resume from the checkpoint of step {checkpoint.finished} in "
                f"{printable(self.checkpoints.folder)}: it does not fit this run ({printable(error)}); remove it to "
                "resume from an earlier step"
            ) from error
        self.writer.begin(table)
        return self.step.finished

    def checkpoint(self) -> None:
        """Save everything that is needed to resume from here bit for bit."""
        checkpoint = Checkpoint(
            finished=self.step.finished,
            model=trained_tensors(self.model, self.optimizer),
            frozen=[name for name, p in self.model.named_parameters() if not p.requires_grad],
            optimizer=optimizer_state(self.model, self.optimizer),
            scheduler=self.scheduler.last_epoch,
            method=self.method.state(),
            observers=[observer.state() for observer in self.observers],
            generators=generators_state(),
            search=self._search_generator,
            best=self.best,
            seconds=self.seconds,
        )
        self.checkpoints.save(checkpoint, self.writer.table())

    def _load_checkpoint(self, checkpoint: Checkpoint) -> None:
        load_tensors(self.model, checkpoint.model)
        frozen = set(checkpoint.frozen)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.method.restore(checkpoint.method)
        load_optimizer_state(self.model, self.optimizer, checkpoint.optimizer)
        self.scheduler.last_epoch = checkpoint.scheduler
        for observer, state in zip(self.observers, checkpoint.observers, strict=True):
            observer.restore(state)
        load_generators_state(checkpoint.generators)
        self._search_generator, self.best = checkpoint.search, checkpoint.best
        self._seconds_before = checkpoint.seconds
        self.step.index = checkpoint.finished - 1

    def _save_state(self, file: Path) -> None:
        """Write the current trained tensors, and record the current factors."""
        save_state(file, self.model, self.optimizer, self.method)
        self.writer.add(self.step.finished, factors_of(self.model))

    def _state_entry(self) -> State:
        """Return the entry of the current state for ``run.json``."""
        return State(self.step.finished, {name: delta.rank for name, delta in attached_deltas(self.model).items()})

    def finish(self) -> Run:
        """Evaluate the final state on the test split, save it and close the run folder."""
        score = self._score(self.test)
        self.model.eval()
        groups = {} if score.groups is None else score.groups
        tested = [Record("test_loss", score.loss), Record("test_metric", score.metric)]
        if groups:
            tested.append(Record("test_metric_group", np.array(list(groups.values()))))
        self.writer.add(self.step.finished, tested)
        self._save_state(self.path / "state/last.safetensors")
        states = {"last": self._state_entry()}
        if self.best is not None:
            if self.best.step != self.step.finished:
                self.checkpoints.keep_best(self.best.step)
            states["best"] = State(self.best.step, self.best.ranks)
        meta = self.writer.meta
        meta.states = states
        meta.test = Test(score.name, score.metric, score.loss, groups)
        meta.seconds = seconds = self.seconds
        meta.total_seconds += seconds
        run = self.writer.finish("done")
        self.checkpoints.remove()
        return run

    def fail(self, reason: str) -> None:
        """Close the run folder as broken, with the reason; it stays readable."""
        self.writer.meta.error = reason
        self.writer.finish("broken")


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer may change and that clipping covers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None) -> float | None:
    """Clip the global norm of the gradients and return the norm before; without a limit, return None."""
    return None if limit is None else float(torch.nn.utils.clip_grad_norm_(trained_parameters(optimizer), limit))


def nonfinite_reason(step: Step, loss: float, norm: float | None, rate: float) -> str | None:
    """Return a message if the loss or the gradient norm of a step is not finite, else None."""
    if math.isfinite(loss) and (norm is None or math.isfinite(norm)):
        return None
    what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient norm became {norm}"
    return f"{what} at step {step.index + 1} of {step.total} (learning rate {rate:.3g}): lower lr or clip"


def merge_records(step: Step, records: Iterable[Item], observers: Sequence[Observer]) -> list[Item]:
    """Combine the records of a step with those of its observers, without duplicates.

    If both have a quantity of a module, such as the rank at a step that changes it, the observer's is dropped.
    """
    items = list(records)
    known = {(item.quantity, item.module) for item in items if isinstance(item, Record)}
    for observer in observers:
        items.extend(
            item for item in observer(step) if not isinstance(item, Record) or (item.quantity, item.module) not in known
        )
    return items
