"""Session of a phase in training: the operations that the loop calls in each step, and saving and resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lorascope.files.printable import printable
from lorascope.files.whole_files import write_bytes
from lorascope.inputs.metrics import Metric
from lorascope.inputs.models import processor, require_positions
from lorascope.inputs.tasks import Task
from lorascope.inputs.tokenization import IGNORED, EncodedRows, align_targets
from lorascope.methods.method import Batch, HeldOut, Method, Step, copy_method, trained_parameters
from lorascope.observe.trainable import are_finite
from lorascope.runs.manifest import State, Test
from lorascope.runs.run import Run
from lorascope.schema.records import Quantity, Record, register
from lorascope.training.base_weights import Base, begin_training
from lorascope.training.checkpoints import Best, Checkpoint, Checkpoints
from lorascope.training.evaluation import Score, evaluate, to_device
from lorascope.training.peak_memory import reset_peak
from lorascope.training.recording import Recording
from lorascope.training.run_spec import RunSpec
from lorascope.training.state import (
    freeze,
    frozen_names,
    generators_state,
    load_generators_state,
    load_optimizer_state,
    load_state,
    load_tensors,
    optimizer_state,
    read_state,
    trained_tensors,
)
from lorascope.training.trackers import tracker_report


class Session(Recording):
    """Session of one phase in training, recorded in its run folder ``path``, after the finished phases ``parents``.

    The model is trained in place; its head must fit the task of the plan. ``trackers`` are names of ``tracker_names``.
    """

    method: Method

    def __init__(
        self,
        model: nn.Module,
        plan: RunSpec,
        base: Base,
        path: Path,
        parents: list[Run],
        device: str,
        trackers: Sequence[str] = (),
    ) -> None:
        self.model, self.plan, self.device = model, plan, device
        self.settings, self.task = plan.settings, plan.task
        register_metrics(self.settings.metrics)
        self.method = copy_method(plan.phase.method)
        self.optimizer, modules = begin_training(self.method, model, base, plan.settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, plan.settings.rate())
        reader = processor(model)
        self.train = self._encode(reader, plan.rows or plan.task, plan.phase.split)
        self.search = self._encode(reader, plan.task, "search") if self.method.search_share else None
        self.validation = self._encode(reader, plan.task, "validation", plan.settings.eval_size)
        self.test = self._encode(reader, plan.task, "test", plan.settings.test_size)
        self.other_tests: dict[str, EncodedRows] = {}
        for name, split in plan.task.other_tests.items():
            self.other_tests[name] = self._encode(reader, plan.task, split, plan.settings.test_size)
        self._search_generator = torch.Generator().manual_seed(plan.seed)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self.best: Best | None = None
        self.checkpoints = Checkpoints(path)
        sources = self._batch_loss, self._draw_validation, self._held_out_batch
        step = Step(-1, plan.settings.steps, model, self.optimizer, base, modules, *sources)
        step.task, step.max_length = plan.task, plan.settings.max_length
        meta = plan.meta(step, self.method, parents, device)
        super().__init__(path, meta, step, self.method, plan.observers, tracker_report(trackers))

    # -- data ---------------------------------------------------------------------------------------------------

    def _encode(self, reader: Any, task: Task, splits: str, rows: int | None = None) -> EncodedRows:
        tables = [task.split(split, float(self.method.search_share)) for split in splits.split("+")]
        # Rows of a task are sorted by a hash of their content, so the first ones are a random sample.
        table = pd.concat(tables, ignore_index=True).head(rows or len(task.table))
        encoded = task.encode(reader, table, self.settings.max_length)
        require_positions(self.model, int(max(encoded.lengths, default=0)), self.settings.max_length)
        return encoded

    def batch(self, index: int) -> Batch:
        """Return the batch of a 0-based step. Each epoch visits the rows in a new seeded permutation."""
        size, total = self.settings.batch_size, len(self.train)
        positions = range(index * size, (index + 1) * size)
        if self.settings.epochs is not None:
            epoch, step = divmod(index, self.settings.epoch_steps(total))
            start = epoch * total + step * size
            positions = range(start, min(start + size, (epoch + 1) * total))
        rows = []
        for position in positions:
            epoch, row = divmod(position, total)
            # With the epoch in the seed, a resumed run draws the same rows without repeating earlier epochs.
            if self._permutation[0] != epoch:
                self._permutation = (epoch, np.random.default_rng([self.plan.seed, epoch]).permutation(total))
            rows.append(int(self._permutation[1][row]))
        return to_device(self.train.batch(rows), self.device)

    def _draw_validation(self, size: int | None, fixed: bool) -> Batch:
        if self.search is None:
            name, share = type(self.method).__name__, self.method.search_share
            raise ValueError(f"search_share of {name} must be > 0 to draw from the search split, got {share}")
        size = min(size or self.settings.batch_size, len(self.search))
        rows: Sequence[int] = range(size)
        if not fixed:
            rows = torch.randperm(len(self.search), generator=self._search_generator)[:size].tolist()
        return to_device(self.search.batch(rows), self.device)

    def _held_out_batch(self, size: int | None) -> HeldOut:
        rows = range(len(self.validation))[:size]
        groups = self.validation.groups and self.validation.groups[:size]
        return HeldOut(to_device(self.validation.batch(rows), self.device), groups)

    # -- loss and evaluation ------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16)

    def _batch_loss(self, model: nn.Module, batch: Batch, params: Mapping[str, Tensor] | None) -> Tensor:
        with self._autocast():
            if params is None:
                return self._loss(model(**batch), batch["labels"])
            # A forward pass may write to buffers, such as the running means of batch normalization.
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return self._loss(functional_call(model, {**buffers, **params}, (), batch), batch["labels"])

    def _loss(self, output: Any, labels: Tensor) -> Tensor:
        """Return the model's own loss, or the cross-entropy of its logits with smoothed labels."""
        smoothing = self.settings.label_smoothing
        if not smoothing:
            return output.loss.float()
        logits = output.logits
        if not self.task.classifies:
            logits, labels = align_targets(logits, labels, self.train.shifted)
        logits = logits.flatten(0, -2).float()
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)

    def backward(self) -> float:
        """Compute the gradients of the step's batch, in ``accumulate`` micro-batches, and return its loss."""
        count, loss = self.settings.accumulate, 0.0
        total, rows = self.task.count_targets(self.step.batch), self.settings.batch_size // count
        for number in range(count):
            piece = {key: value[number * rows : (number + 1) * rows] for key, value in self.step.batch.items()}
            if not len(piece["labels"]):
                break  # the last batch of an epoch may be shorter
            # The loss of a piece is a mean over its own targets, whose number differs in a language model.
            share = self.task.count_targets(piece) / total if count > 1 else 1.0
            value = self._batch_loss(self.model, piece, None) * share
            value.backward()
            loss += float(value.detach())
        return loss

    def evaluate(self) -> Score | None:
        """Evaluate on the validation split if the step is due; mark the best step so far and save its state.

        Step 0 is never the best, because nothing was trained. Returns None between evaluations.
        """
        step = self.step
        step.best = False
        if step.finished % self.settings.evaluation_steps and not step.last:
            return None
        score = self._score(self.validation)
        self.add([Record("eval_loss", score.loss), Record("eval_metric", score.metric)])
        self.add([Record(f"eval_{name}", value) for name, value in score.values.items()])
        key = (score.metric if score.higher_is_better else -score.metric, -score.loss)
        # NaN, such as the correlation of a constant, is never the best.
        is_better = not math.isnan(score.metric) and (self.best is None or key > self.best.key)
        if step.finished and self.method.settled(step) and is_better:
            step.best = True
            # finish() saves the last state.
            entry = self.state_entry() if step.last else self.save_state(self.checkpoints.best_file(step.finished))
            self.best = Best(key=key, **vars(entry))
        return score

    def _score(self, rows: Any) -> Score:
        with self._autocast():
            return evaluate(self.model, rows, self.device, metrics=self.settings.metrics)

    # -- saving and resuming ------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Start, or resume from the newest intact checkpoint; return the 0-based step to run next."""
        self.model.train()
        reset_peak(self.device)
        newest = self.checkpoints.newest()
        if newest is None:
            return self.start()
        checkpoint, table = newest
        try:
            self.load(checkpoint)
        # The checkpoint is intact, but another version of a method or an observer may have stored another state.
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"cannot resume from the checkpoint of step {checkpoint.finished} in "
                f"{printable(self.checkpoints.folder)}: it does not fit this run ({printable(error)}); remove it to "
                "resume from an earlier step"
            ) from error
        self.begin_rows(table)
        return checkpoint.finished

    def start(self) -> int:
        """Record the state before the first step of a training without a checkpoint, and return that step."""
        self.begin_rows(None)
        if self.settings.eval_every != 0:
            self.evaluate()
        self.record()
        self.flush_report()
        return 0

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, except for its rows."""
        load_tensors(self.model, checkpoint.model)
        freeze(self.model, checkpoint.frozen)
        self.method.restore(checkpoint.method)
        load_optimizer_state(self.model, self.optimizer, checkpoint.optimizer)
        self.scheduler.last_epoch = checkpoint.scheduler
        self.resume(checkpoint.observers, checkpoint.seconds)
        load_generators_state(checkpoint.generators)
        self._search_generator, self.best = checkpoint.search, checkpoint.best
        self.step.index = checkpoint.finished - 1

    def checkpoint(self) -> None:
        """Save everything that is needed to resume from here bit for bit."""
        self.writer.require_folder()
        self.checkpoints.save(self._describe(), self.writer.table())

    def keep_checkpoint(self) -> None:
        """Save a checkpoint for forks, which stays when the run finishes."""
        self.writer.require_folder()
        self.checkpoints.keep(self._describe(), self.writer.table())

    def _describe(self) -> Checkpoint:
        return Checkpoint(
            finished=self.step.finished,
            model=trained_tensors(self.model, self.optimizer),
            frozen=frozen_names(self.model),
            optimizer=optimizer_state(self.model, self.optimizer),
            scheduler=self.scheduler.last_epoch,
            method=self.method.state(),
            generators=generators_state(),
            search=self._search_generator,
            best=self.best,
            **self.state(),
        )

    def finish(self) -> Run:
        """Evaluate a state on the test split, save the last and the best one and close the run folder."""
        score, groups = self._score_tested_state()
        self.model.eval()
        tested = [Record("test_loss", score.loss), Record("test_metric", score.metric)]
        if groups:
            tested.append(Record("test_metric_group", np.array(list(groups.values()))))
        self.add([*tested, *(Record(f"test_{name}", value) for name, value in score.values.items())])
        states = {"last": self.save_state(self.path / "state/last.safetensors")}
        if self.best is not None:
            if self.best.step != self.step.finished:
                best = self.checkpoints.best_file(self.best.step)
                # A copy, because the run resumes from the checkpoints if the process dies before its end.
                write_bytes(self.path / "state/best.safetensors", best.read_bytes())
            states["best"] = State(self.best.step, self.best.ranks)
        self.writer.meta.states = states
        self.writer.meta.test = Test(score.name, score.metric, score.loss, groups)
        if score.values:
            self.writer.meta.test.values = score.values
            self.writer.meta.test.higher_is_better = score.higher_is_better
        self.writer.write_predictions(score.predictions)
        run = self.close("done")
        self.checkpoints.remove()
        return run

    def _score_tests(self) -> tuple[Score, dict[str, float]]:
        """Evaluate the model on the test split; return the score, and the metric of each group or test set."""
        score = self._score(self.test)
        groups = score.groups
        if self.task.test_sets:
            groups[self.task.test_sets[0]] = score.metric
        for name, rows in self.other_tests.items():
            groups[name] = self._score(rows).metric
        return score, groups

    def _score_tested_state(self) -> tuple[Score, dict[str, float]]:
        """Evaluate the state that ``test_state`` names on the test split, and leave the model in its last state."""
        if self.settings.test_state == "last" or self.best is None or self.best.step == self.step.finished:
            return self._score_tests()
        # A copy, because both share the memory of the live tensors.
        last = copy.deepcopy((trained_tensors(self.model, self.optimizer), self.method.state()))
        load_state(self.model, self.method, *read_state(self.checkpoints.best_file(self.best.step)))
        scores = self._score_tests()
        load_state(self.model, self.method, *last)
        return scores


def register_metrics(metrics: Sequence[Metric]) -> None:
    """Register the quantities that a session records for metrics, one per split."""
    for metric in metrics:
        for prefix, split in {"eval": "validation", "test": "test"}.items():
            quantity = Quantity(f"{split} {metric.name}", definition=f"metric {metric.name} on the {split} split")
            register(f"train with metric={metric.name!r}", **{f"{prefix}_{metric.name}": quantity})


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None) -> float | None:
    """Clip the global norm of the gradients in a session, and return the norm before; without a limit, return None."""
    if limit is None:
        return None
    return float(torch.nn.utils.clip_grad_norm_(trained_parameters(optimizer), limit))


def nonfinite_reason(step: Step, loss: float, norm: float | None, rate: float) -> str | None:
    """Return why a session must end if the loss or the gradient norm of a step is not finite, else None."""
    if math.isfinite(loss) and (norm is None or math.isfinite(norm)):
        return None
    number, fix = step.index + 1, "lower lr or clip"
    if not are_finite(step.model.parameters()):
        order = "the weights before it were not finite"
        if number == 1:
            fix = "load other weights"
    elif math.isfinite(loss):
        order = "the loss and the weights before it were finite"
    else:
        order, fix = "the weights before it were finite", f"check its batch and the loss function, or {fix}"
    problem = f"the gradient norm became {norm}" if math.isfinite(loss) else f"the loss became {loss}"
    return f"{problem} at step {number} of {step.total} (learning rate {rate:.3g}), {order}: {fix}"
