"""Loss and metric of a model on encoded rows, stored per row so that groups can be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorascope.array_types import Bool, Float, Float32, Int, Int8, Int16
from lorascope.files.predictions import predict_classes, quantize_margins, to_choice_columns
from lorascope.inputs.answer_spans import Windows, best_span
from lorascope.inputs.metrics import DEFAULTS, Metric, get, stack_choices
from lorascope.inputs.tokenization import IGNORED, EncodedRows, align_targets, token_losses
from lorascope.training.processes import SINGLE_PROCESS, Processes


@dataclass(frozen=True, eq=False)
class Score:
    """Result of an evaluation: ``name`` of the metric, such as "accuracy" or "perplexity", and values of each row.

    ``nll`` is the negative log-likelihood in nats, of the class or summed over the target tokens, or the squared error
    of a number; ``counts`` is the number of target tokens, 1 for a class or number; ``correct`` is whether the model
    prefers the correct class or response, None without a closed set of answers; ``margins`` is by how much, see
    ``quantize_margins``; ``predicted`` and ``answers`` are the numbers of the preferred and the right class or
    response, or the predicted and the right number; ``metrics`` replace the accuracy, the first one as ``metric``.
    ``texts`` are generated ones, or spans of contexts, with the columns ``prompt, text, references``, and ``group`` if
    there are groups; with them, the metrics are of texts. ``choices`` are log-likelihood, characters and bytes of the
    choices of each row, see ``Metric.compute``.
    """

    name: str
    nll: Float[np.ndarray, "rows"]
    counts: Int[np.ndarray, "rows"]
    correct: Bool[np.ndarray, "rows"] | None
    row_groups: list[str] | None
    margins: Int8[np.ndarray, "rows"] | None = None
    predicted: Int16[np.ndarray, "rows"] | Float32[np.ndarray, "rows"] | None = None
    answers: Int[np.ndarray, "rows"] | Float32[np.ndarray, "rows"] | None = None
    metrics: tuple[Metric, ...] = ()
    texts: pd.DataFrame | None = None
    choices: Float[np.ndarray, "rows choices 3"] | None = None

    @property
    def loss(self) -> float:
        """Mean loss per class or target token, in nats."""
        return float(self.nll.sum() / self.counts.sum())

    @property
    def metric(self) -> float:
        """The first of the metrics; without any, accuracy, or perplexity of the target tokens."""
        if self.metrics:
            return self.values[self.name]
        return self._metric(np.ones(len(self.nll), dtype=bool))

    @cached_property
    def values(self) -> dict[str, float]:
        """All metrics by name, in the order in which they were requested; empty without any."""
        rows = np.ones(len(self.nll if self.texts is None else self.texts), dtype=bool)
        return {metric.name: self._compute(metric, rows) for metric in self.metrics}

    @property
    def predictions(self) -> pd.DataFrame:
        """Values of each row as a run stores them; ``nll`` is scaled so that its mean is the loss."""
        nll = self.nll * (len(self.nll) / self.counts.sum())
        if self.margins is not None:
            return pd.DataFrame({"margin": self.margins, "nll": nll.astype(np.float16), "predicted": self.predicted})
        if self.choices is not None:
            rows = pd.DataFrame({"nll": nll.astype(np.float16), "predicted": self.predicted})
            return rows.join(to_choice_columns(self.choices[..., 0]))
        if self.predicted is not None:
            # Squared errors exceed the largest number of float16.
            return pd.DataFrame({"nll": nll.astype(np.float32), "predicted": self.predicted})
        return pd.DataFrame({"nll": nll.astype(np.float16)})

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher metric is better: True for accuracy, False for perplexity."""
        if self.metrics:
            return self.metrics[0].higher_is_better
        return self.correct is not None

    @property
    def groups(self) -> dict[str, float]:
        """Metric of each group by name; empty without groups."""
        names = np.array(self.row_groups or [])
        if self.row_groups and self.metrics and self.texts is not None:
            names = self.texts["group"].to_numpy()
        return {str(name): self._metric(names == name) for name in np.unique(names)}

    def _compute(self, metric: Metric, rows: Bool[np.ndarray, "units"]) -> float:
        if self.texts is not None:
            texts = self.texts[rows]
            return float(metric.compute(texts["text"].to_list(), texts["references"].to_list()))
        assert self.predicted is not None
        assert self.answers is not None
        if self.choices is not None:
            return float(metric.compute(self.choices[rows], self.answers[rows]))
        dtype = np.result_type(self.answers, np.int64)  # int64 of classes, float64 of values
        return float(metric.compute(self.predicted[rows].astype(dtype), self.answers[rows].astype(dtype)))

    def _metric(self, rows: Bool[np.ndarray, "units"]) -> float:
        if self.metrics:
            return self._compute(self.metrics[0], rows)
        if self.correct is not None:
            return float(self.correct[rows].mean())
        loss = float(self.nll[rows].sum() / self.counts[rows].sum())
        return math.exp(loss) if loss < 700 else math.inf  # the exponential overflows float64 at 710


def to_device(batch: dict[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """Return a batch to evaluate or train on, copied to a device."""
    return {key: value.to(device) for key, value in batch.items()}


def evaluate(
    model: nn.Module,
    encoded: EncodedRows,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    metrics: tuple[Metric, ...] = (),
    processes: Processes = SINGLE_PROCESS,
) -> Score:
    """Evaluate a model without gradients or dropout, and restore its train or eval mode.

    The loss is the cross-entropy only, without terms that a model adds to its own loss. In a closed set of responses,
    all differ in the token at one position. A row is correct if the token of its response has the largest logit among
    these; a tie is an error. This takes one forward pass and, for one-token responses, equals comparing their
    probabilities. Rows of similar length are batched together. ``metrics`` are of classes or, if these are numbers to
    predict, of values. Prompts with choices have metrics of choices, each of which takes one forward pass.
    Questions with a context have metrics of texts, and their loss is the cross-entropy over each window's own tokens.
    Several ``processes`` share the batches, and all return the scores of all rows; choices and questions are scored in
    each process.
    """
    if encoded.values is not None:
        return _score_values(model, encoded, device, batch_size, metrics, processes)
    if isinstance(encoded, Windows):
        return _score_spans(model, encoded, device, batch_size, metrics)
    if encoded.continuations is not None:
        return _score_choices(model, encoded, device, batch_size, metrics)
    total = len(encoded)
    # Stable, so that rows of one length are in the same batches on every machine.
    order = np.argsort(encoded.lengths, kind="stable")
    nll, counts = np.zeros(total), np.zeros(total, dtype=np.int64)
    margins, predicted = np.zeros(total, dtype=np.int8), np.zeros(total, dtype=np.int16)
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in processes.local_starts(total, batch_size):
            rows = order[start : start + batch_size]
            batch = to_device(encoded.batch(rows), device)
            counts[rows] = 1
            if encoded.classes is not None:
                labels = batch.pop("labels")
                logits = model(**batch).logits.float()
                nll[rows] = F.cross_entropy(logits, labels, reduction="none").cpu().numpy()
                answers, class_logits = encoded.classes[rows], logits.cpu().numpy()
            else:
                nll[rows], counts[rows], class_logits = _score_tokens(model, batch, encoded)
                if encoded.choices is None:
                    continue
                answers = encoded.choices.answers[rows]
            margins[rows] = quantize_margins(class_logits, answers)
            predicted[rows] = predict_classes(class_logits, answers)
    model.train(training)
    nll, counts, margins, predicted = processes.sum_arrays([nll, counts, margins, predicted])
    if encoded.classes is None and encoded.choices is None:
        return Score("perplexity", nll, counts, None, encoded.groups)
    right_classes = encoded.classes
    if encoded.choices is not None:
        right_classes = encoded.choices.answers
    name = metrics[0].name if metrics else "accuracy"
    return Score(name, nll, counts, margins > 0, encoded.groups, margins, predicted, right_classes, metrics)


def _score_values(
    model: nn.Module,
    encoded: EncodedRows,
    device: str | torch.device,
    batch_size: int,
    metrics: tuple[Metric, ...],
    processes: Processes,
) -> Score:
    """Evaluate the numbers that a model predicts; the loss is the mean squared error, as is the default metric."""
    assert encoded.values is not None
    predicted = np.zeros(len(encoded), dtype=np.float32)
    order = np.argsort(encoded.lengths, kind="stable")
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in processes.local_starts(len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = to_device(encoded.batch(rows), device)
            del batch["labels"]
            predicted[rows] = model(**batch).logits[:, 0].float().cpu().numpy()
    model.train(training)
    (predicted,) = processes.sum_arrays([predicted])
    errors = (predicted.astype(np.float64) - encoded.values) ** 2
    metrics = metrics or (get(DEFAULTS["regression"]),)
    counts = np.ones(len(encoded), dtype=np.int64)
    return Score(metrics[0].name, errors, counts, None, encoded.groups, None, predicted, encoded.values, metrics)


def _score_spans(
    model: nn.Module, encoded: Windows, device: str | torch.device, batch_size: int, metrics: tuple[Metric, ...]
) -> Score:
    """Evaluate the spans that a model selects; the loss is the mean over windows of start and end."""
    order = np.argsort(encoded.lengths, kind="stable")
    logits: list[Any] = [None] * len(encoded)
    window_nll = np.zeros(len(encoded))
    training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(0, len(order), batch_size):
            windows = order[first : first + batch_size]
            batch = to_device(encoded.batch(windows), device)
            positions = torch.stack([batch.pop("start_positions"), batch.pop("end_positions")], dim=1)
            output = model(**batch)
            both_logits = torch.stack([output.start_logits, output.end_logits], dim=2).float()
            is_padding = batch["attention_mask"] == 0
            masked = both_logits.masked_fill(is_padding[..., None], -math.inf)
            # Axis 1 has the tokens, as cross_entropy expects classes.
            losses = F.cross_entropy(masked, positions, reduction="none")
            window_nll[windows] = losses.mean(dim=1).double().cpu().numpy()
            for window, values in zip(windows, both_logits.cpu().numpy(), strict=True):
                logits[window] = values[: len(encoded.offsets[window])]
    model.train(training)
    rows = np.arange(len(encoded.table))
    firsts, ends = np.searchsorted(encoded.rows, rows), np.searchsorted(encoded.rows, rows, side="right")
    texts = []
    for context, first, end in zip(encoded.table["context"], firsts, ends, strict=True):
        texts.append(best_span(logits[first:end], encoded.offsets[first:end], context, encoded.can_be_empty))
    table = encoded.table.drop(columns="context")
    table.insert(1, "text", texts)
    groups = table["group"].to_list() if "group" in table else None
    nll, counts = np.bincount(encoded.rows, window_nll), np.bincount(encoded.rows)
    metrics = metrics or (get(DEFAULTS["span"]),)
    return Score(metrics[0].name, nll, counts, None, groups, metrics=metrics, texts=table)


def _score_choices(
    model: nn.Module, encoded: EncodedRows, device: str | torch.device, batch_size: int, metrics: tuple[Metric, ...]
) -> Score:
    """Evaluate the log-likelihood of every choice; the loss is the mean of the right ones per token."""
    continuations = encoded.continuations
    assert continuations is not None
    score = evaluate(model, continuations.tokens, device, batch_size)
    rows, answers = continuations.rows, continuations.answers
    log_likelihoods = np.full((len(encoded), int(continuations.numbers.max(initial=0)) + 1), -np.inf)
    # Rounded as they are stored, so that the metrics of the stored ones are equal.
    log_likelihoods[rows, continuations.numbers] = (-score.nll).astype(np.float32)
    predicted = log_likelihoods.argmax(axis=1).astype(np.int16)
    is_right = continuations.numbers == answers[rows]
    nll, counts = score.nll[is_right], score.counts[is_right]
    metrics = metrics or (get(DEFAULTS["choice"]),)
    choices = stack_choices(log_likelihoods, continuations.texts)
    correct = predicted == answers
    return Score(
        metrics[0].name, nll, counts, correct, encoded.groups, None, predicted, answers, metrics, choices=choices
    )


def _score_tokens(model: nn.Module, batch: dict[str, Tensor], encoded: EncodedRows) -> tuple[Any, Any, Any]:
    """Return loss and number of the target tokens of each row, and the logits of a closed set of responses."""
    labels = batch["labels"]
    if encoded.shifted:
        del batch["labels"]  # otherwise a causal LM also computes a loss, which is not used
    logits, labels = align_targets(model(**batch).logits, labels, encoded.shifted)
    is_target = labels != IGNORED
    nll = token_losses(logits, labels)
    class_logits = None
    if encoded.choices is not None:
        where = is_target.int().argmax(1) + encoded.choices.offset
        at_choice = logits[torch.arange(len(labels), device=labels.device), where]
        class_logits = at_choice[:, torch.from_numpy(encoded.choices.tokens).to(labels.device)].float().cpu().numpy()
    return nll.sum(1).double().cpu().numpy(), is_target.sum(1).cpu().numpy(), class_logits
