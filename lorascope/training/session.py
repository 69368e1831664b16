"""Session of a phase in training: the operations that the loop calls in each step, and saving and resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lorascope.adapters.delta import SUMMED
from lorascope.files.printable import printable
from lorascope.files.whole_files import write_bytes
from lorascope.inputs.metrics import Metric
from lorascope.inputs.models import processor, require_positions
from lorascope.inputs.tasks import Task
from lorascope.inputs.tokenization import IGNORED, EncodedRows, align_targets
from lorascope.methods.method import Batch, HeldOut, Method, Step, copy_method, trained_parameters
from lorascope.methods.precision import wide_dtype
from lorascope.observe.trainable import are_finite
from lorascope.runs.layout import PREDICTIONS, TEXTS
from lorascope.runs.manifest import State, Test
from lorascope.runs.run import Run
from lorascope.schema.records import Quantity, Record, register
from lorascope.training.base_weights import Base, begin_training
from lorascope.training.checkpoints import Best, Checkpoint, Checkpoints
from lorascope.training.evaluation import Score, evaluate, to_device
from lorascope.training.generation import generate_texts, group_references
from lorascope.training.peak_memory import reset_peak
from lorascope.training.processes import SINGLE_PROCESS, Processes, SilentWriter, count_rows
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
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.processes = processes
        self.model, self.plan, self.device = model, plan, device
        self.settings, self.task = plan.settings, replace(plan.task, augment=plan.settings.augment)
        register_metrics(self.settings.metrics)
        self.method = copy_method(plan.phase.method)
        self.optimizer, modules = begin_training(self.method, model, base, plan.settings)
        setattr(self.optimizer, SUMMED, True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, plan.settings.rate())
        self._reader = reader = processor(model)
        train = replace(plan.rows or self.task, augment=plan.settings.augment)
        self.train = self._encode(reader, train, plan.phase.split)
        self.search = self._encode(reader, self.task, "search") if self.method.search_share else None
        self.validation = self._encode(reader, self.task, "validation", plan.settings.eval_size)
        self.test = self._encode(reader, self.task, "test", plan.settings.test_size)
        self.other_tests: dict[str, EncodedRows] = {}
        for name, split in plan.task.other_tests.items():
            self.other_tests[name] = self._encode(reader, self.task, split, plan.settings.test_size)
        self._search_generator = torch.Generator().manual_seed(plan.seed)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self.best: Best | None = None
        self._result: Run | None = None  # of the first process
        self.checkpoints = Checkpoints(path)
        sources = self._batch_loss, self._draw_validation, self._held_out_batch
        step = Step(-1, plan.settings.steps, model, self.optimizer, base, modules, *sources)
        step.task, step.max_length = self.task, plan.settings.max_length
        step.local_rows, step.sum_processes = self._local_rows, processes.sum_tensors
        meta = plan.meta(step, self.method, parents, device)
        report = None
        if processes.first:
            report = tracker_report(trackers)
        super().__init__(path, meta, step, self.method, plan.observers, report)
        if not processes.first:
            self.writer = SilentWriter(path, meta)

    # -- data ---------------------------------------------------------------------------------------------------

    def _rows(self, task: Task, splits: str, rows: int | None) -> pd.DataFrame:
        tables = [task.split(split, float(self.method.search_share)) for split in splits.split("+")]
        # Rows of a task are sorted by a hash of their content, so the first ones are a random sample.
        return pd.concat(tables, ignore_index=True).head(rows or len(task.table))

    def _encode(self, reader: Any, task: Task, splits: str, rows: int | None = None) -> EncodedRows:
        encoded = task.encode(reader, self._rows(task, splits, rows), self.settings.max_length)
        require_positions(self.model, encoded.longest, self.settings.max_length)
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
        # The step is in the seed for the same reason; the last number tells it from the seed of an epoch.
        generator = np.random.default_rng([self.plan.seed, index, 1])
        return to_device(self.train.training_batch(rows, generator), self.device)

    def _local_rows(self, batch: Batch) -> tuple[Batch, float]:
        """Return the rows of a batch that this process computes, and their fraction of the targets."""
        rows = self.processes.local_rows(batch)
        if rows is batch:
            return batch, 1.0
        if not count_rows(rows):  # all processes compute a loss, so that their sums have the same terms
            return {key: value[:1] for key, value in batch.items()}, 0.0
        return rows, self.task.count_targets(rows) / self.task.count_targets(batch)

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
                return self._loss(model(**batch), batch.get("labels"))
            # A forward pass may write to buffers, such as the running means of batch normalization.
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return self._loss(functional_call(model, {**buffers, **params}, (), batch), batch.get("labels"))

    def _loss(self, output: Any, labels: Tensor | None) -> Tensor:
        """Return the model's own loss, or the cross-entropy of its logits with smoothed labels."""
        smoothing = self.settings.label_smoothing
        if not smoothing:
            return output.loss.to(wide_dtype(output.loss))
        assert labels is not None
        logits = output.logits
        if not self.task.classifies:
            logits, labels = align_targets(logits, labels, self.train.shifted)
        logits = logits.flatten(0, -2).to(wide_dtype(logits))
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)

    def backward(self) -> float:
        """Compute the gradients of the step's batch and return its loss; ``accumulate`` is per process."""
        count, loss = self.settings.accumulate, 0.0
        pieces = count * self.processes.size
        total, rows = self.task.count_targets(self.step.batch), self.settings.batch_size // pieces
        local_batch = self.processes.local_rows(self.step.batch)
        with self.processes.local_draws(self.plan.seed, self.step.index):
            for number in range(count):
                piece = {key: value[number * rows : (number + 1) * rows] for key, value in local_batch.items()}
                if not count_rows(piece):
                    break  # the last batch of an epoch may be shorter
                # The loss of a piece is a mean over its own targets, whose number differs in a language model.
                share = self.task.count_targets(piece) / total if pieces > 1 else 1.0
                value = self._batch_loss(self.model, piece, None) * share
                value.backward()
                loss += float(value.detach())
        return self.processes.sum_gradients(trained_parameters(self.optimizer), loss)

    def evaluate(self) -> Score | None:
        """Evaluate on the validation split if the step is due; mark the best step so far and save its state.

        Step 0 is never the best, because nothing was trained. Returns None between evaluations.
        """
        step = self.step
        step.best = False
        if step.finished % self.settings.evaluation_steps and not step.last:
            return None
        score, generation = self._score(self.validation), self.settings.text_generation
        is_due = generation is not None and generation.is_due(
            step.finished // self.settings.evaluation_steps, step.last
        )
        if is_due:
            score = self._generate(score, "validation", self.settings.eval_size)
        self.add([Record("eval_loss", score.loss)])
        # Without texts, the metric of the score is the perplexity, which the run does not record.
        if is_due or generation is None or not self.settings.metrics:
            self.add([Record("eval_metric", score.metric)])
        self.add([Record(f"eval_{name}", value) for name, value in score.values.items()])
        # A perplexity is not comparable with the metric of the evaluations that generate.
        is_candidate = is_due or generation is None or not generation.every
        key = (score.metric if score.higher_is_better else -score.metric, -score.loss)
        # NaN, such as the correlation of a constant, is never the best.
        is_better = not math.isnan(score.metric) and (self.best is None or key > self.best.key)
        if step.finished and self.method.settled(step) and is_candidate and is_better:
            step.best = True
            # finish() saves the last state.
            entry = self.state_entry() if step.last else self.save_state(self.checkpoints.best_file(step.finished))
            self.best = Best(key=key, **vars(entry))
        return score

    def _score(self, rows: Any) -> Score:
        with self._autocast():
            return evaluate(self.model, rows, self.device, metrics=self.settings.metrics, processes=self.processes)

    def _generate(self, score: Score, split: str, rows: int | None) -> Score:
        """Return the score of rows with the metrics of texts that are generated from their prompts."""
        generation, metrics = self.settings.text_generation, self.settings.metrics
        assert generation is not None
        items = group_references(self._rows(self.task, split, rows))
        prompts, length = items["prompt"].to_list(), self.settings.max_length
        with self._autocast():
            texts = generate_texts(self.model, self._reader, prompts, generation, length, self.device)
        items.insert(1, "text", texts)
        name = metrics[0].name if metrics else score.name
        return replace(score, name=name, metrics=metrics, texts=items)

    # -- saving and resuming ------------------------------------------------------------------------------------

    def record(self, loss: float | None = None, grad_norm: float | None = None, lr: float | None = None) -> None:
        """Record the values of this step, in the first process."""
        if self.processes.first:
            with self.processes.unchanged_draws():
                super().record(loss, grad_norm, lr)

    def save_state(self, file: Path) -> State:
        """Write what training changed, in the first process, and return the entry of the state for ``run.json``."""
        if self.processes.first:
            return super().save_state(file)
        return self.state_entry()

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
        self.processes.call_first(self._write_checkpoint, self.checkpoints.save)

    def keep_checkpoint(self) -> None:
        """Save a checkpoint for forks, which stays when the run finishes."""
        self.processes.call_first(self._write_checkpoint, self.checkpoints.keep)

    def _write_checkpoint(self, write: Callable[[Checkpoint, pd.DataFrame], None]) -> None:
        self.writer.require_folder()
        write(self._describe(), self.writer.table())

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
        self.processes.call_first(self._write_result, score, groups)
        if self._result is None:
            return Run.read(self.path)
        return self._result

    def _write_result(self, score: Score, groups: dict[str, float]) -> None:
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
        self.writer.write_rows(PREDICTIONS, score.predictions)
        if score.texts is not None:
            # Nested columns are not read again.
            self.writer.write_rows(TEXTS, score.texts.explode("references"))
        self._result = self.close("done")
        self.checkpoints.remove()

    def _score_tests(self) -> tuple[Score, dict[str, float]]:
        """Evaluate the model on the test split; return the score, and the metric of each group or test set."""
        score = self._score_test("test", self.test)
        groups = score.groups
        if self.task.test_sets:
            groups[self.task.test_sets[0]] = score.metric
        for name, rows in self.other_tests.items():
            groups[name] = self._score_test(self.task.other_tests[name], rows).metric
        return score, groups

    def _score_test(self, split: str, rows: EncodedRows) -> Score:
        score = self._score(rows)
        if self.settings.text_generation is None:
            return score
        return self._generate(score, split, self.settings.test_size)

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
