"""Measures of a model on encoded rows, one value per row: the task loss, and the distance from the base."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorascope.adapters.activation_patching import Batch, JointMove, Move, moved_measures
from lorascope.analysis.dial import MeasuredRows
from lorascope.analysis.domain_probe import DomainProbe
from lorascope.array_types import Float, Int
from lorascope.inputs.answer_spans import Windows
from lorascope.inputs.tokenization import IGNORED, EncodedRows, align_targets, token_losses

BATCH = 16
"""Rows of the longest length in a batch; shorter rows are as many as have as many tokens."""
# A batch takes as long as this many more tokens. In batches of 16 rows, padding added 10 to 46% to the tokens of 64 and
# 192 sentences; so it adds 5 to 10%.
_TOKENS_PER_BATCH = 32
_REFERENCE = "reference of "  # begins the keys of a batch with what the base returns on it


class RowMeasure(ABC):
    """Measure of a model with one value per row of some text, summed over the row's targets.

    Parameters
    ----------
    model : Module
        Model in evaluation mode, whose adapters the caller attaches and scales.
    encoded : EncodedRows
        Rows to measure.
    table : DataFrame
        The same rows before their encoding.
    """

    unit = "nats"

    def __init__(self, model: nn.Module, encoded: EncodedRows, table: pd.DataFrame) -> None:
        if encoded.values is not None:
            raise ValueError("cannot measure in nats: labels must be classes or texts, got numbers")
        if isinstance(encoded, Windows):
            raise ValueError("cannot measure in nats: labels must be classes or texts, got spans")
        self.model, self.shifted = model, encoded.shifted
        device = next(model.parameters()).device
        self.batched_rows = batch_by_length(encoded.lengths)
        self.order = np.concatenate(self.batched_rows)
        self.batches: list[Batch] = []
        for rows in self.batched_rows:
            self.batches.append({key: value.to(device) for key, value in encoded.batch(rows).items()})
        self.receipt = f"{len(table)} rows {hash_rows(table)}"
        self.clusters = np.arange(len(table))
        if "cluster" in table:
            self.clusters = pd.factorize(table["cluster"])[0].astype(np.int64)
        self.counts = self._in_order(self.count_targets(batch) for batch in self.batches)

    @abstractmethod
    def measure(self, batch: Batch) -> Float[Tensor, "rows *measures"]:
        """Measure the model on a batch, with gradients."""

    def count_targets(self, batch: Batch) -> Float[Tensor, "rows"]:
        """Return the number of targets of each row, over which a mean is taken."""
        labels = batch["labels"]
        if labels.ndim == 1:
            return torch.ones(len(labels))
        if self.shifted:  # nothing predicts the first token
            labels = labels[:, 1:]
        return labels.ne(IGNORED).sum(1).float()

    def rows(self) -> MeasuredRows:
        """Return what the statistics of these rows require."""
        return MeasuredRows(self.unit, self.counts, self.clusters)

    @torch.no_grad()
    def values(self) -> Float[np.ndarray, "row *measures"]:
        """Measure every row of the model as it is."""
        return self._in_order(self.measure(batch) for batch in self.batches)

    @torch.no_grad()
    def moved_values(
        self, moves: Mapping[str, Sequence[Move | JointMove]]
    ) -> dict[str, list[Float[np.ndarray, "row *measures"]]]:
        """Measure every row under each move of each module's output; see ``moved_measures``."""
        measured: dict[str, list[list[Tensor]]] = {}
        for name, module_moves in moves.items():
            measured[name] = [[] for _ in module_moves]
        for batch in self.batches:
            for name, measures in moved_measures(self.model, self.measure, batch, moves)[1].items():
                for batches, values in zip(measured[name], measures, strict=True):
                    batches.append(values)
        ordered = {}
        for name, moved in measured.items():
            ordered[name] = list(map(self._in_order, moved))
        return ordered

    def slopes(self, gates: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of the mean measure per target with respect to some tensors that the model uses."""
        total = [torch.zeros_like(gate) for gate in gates]
        for batch in self.batches:
            # A module that a batch does not reach, such as one of a skipped expert, has slope 0.
            gradients = torch.autograd.grad(self.measure(batch).sum(), gates, materialize_grads=True)
            torch._foreach_add_(total, gradients)
        torch._foreach_div_(total, float(self.counts.sum()))
        return total

    def _in_order(self, batches: Any) -> Float[np.ndarray, "row *measures"]:
        values = torch.cat(list(batches)).double().cpu().numpy()
        ordered = np.empty_like(values)
        ordered[self.order] = values
        return ordered


class TaskLoss(RowMeasure):
    """Negative log-likelihood of the class or of the target tokens, in nats."""

    def measure(self, batch: Batch) -> Float[Tensor, "rows"]:
        """Measure the task loss of a batch."""
        logits, labels = self.target_logits(batch)
        if labels.ndim == 1:
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.to(wide), labels, reduction="none")
        return token_losses(logits, labels).sum(1)

    def target_logits(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "rows *targets outputs"], Int[Tensor, "rows *targets"]]:
        """Return logits and labels of the same classes or target tokens."""
        inputs, labels = _inputs(batch), batch["labels"]
        if labels.ndim == 1:
            return self.model(**inputs).logits, labels
        if not self.shifted:  # an encoder-decoder derives its decoder's inputs from the labels
            inputs["labels"] = labels
        return align_targets(self.model(**inputs).logits, labels, self.shifted)


class DistanceFromBase(RowMeasure):
    """Distance of the model from the base on rows, whose labels are not used; create it while the adapter is detached.

    The outputs of the base are computed once and kept in the batches.
    """

    def __init__(self, model: nn.Module, encoded: EncodedRows, table: pd.DataFrame) -> None:
        super().__init__(model, encoded, table)
        # Batches of several distances can be merged.
        self.reference = f"{_REFERENCE}{type(self).__name__}"
        with torch.no_grad():
            for batch in self.batches:
                batch[self.reference] = self.outputs(_inputs(batch))

    @abstractmethod
    def outputs(self, inputs: Batch) -> Tensor:
        """Return the outputs that are compared (rows, ...)."""


class Divergence(DistanceFromBase):
    """Kullback-Leibler divergence KL(base || model) of the predicted classes or target tokens, in nats."""

    def outputs(self, inputs: Batch) -> Float[Tensor, "rows *targets outputs"]:
        """Return the log-probabilities of classes or of the next tokens."""
        logits = self.model(**inputs).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.log_softmax(logits.to(wide), -1)

    def measure(self, batch: Batch) -> Float[Tensor, "rows"]:
        """Measure the divergence, summed over the targets of each row."""
        reference = batch[self.reference]
        divergence = F.kl_div(self.outputs(_inputs(batch)), reference, reduction="none", log_target=True).sum(-1)
        labels = batch["labels"]
        if labels.ndim == 1:
            return divergence
        if self.shifted:
            divergence, labels = divergence[:, :-1], labels[:, 1:]
        return (divergence * labels.ne(IGNORED)).sum(1)


class Drift(DistanceFromBase):
    """Drift of the mean last hidden state z: half the squared distance of the unit vectors, one minus their cosine.

    As a difference of vectors it is exactly 0 for equal ones, where one minus the cosine leaves 7e-16.
    """

    unit = "drift"

    def outputs(self, inputs: Batch) -> Float[Tensor, "rows d"]:
        """Return the mean of the last hidden state over the tokens of each row, scaled to length 1."""
        return F.normalize(pooled_states(self.model, inputs), dim=-1)

    def measure(self, batch: Batch) -> Float[Tensor, "rows"]:
        """Measure the drift of each row."""
        return (self.outputs(_inputs(batch)) - batch[self.reference]).square().sum(-1) / 2

    def count_targets(self, batch: Batch) -> Float[Tensor, "rows"]:
        return torch.ones(len(batch["labels"]))


class ProbeDivergence(DistanceFromBase):
    """Kullback-Leibler divergence KL(base || model) of a frozen probe's classes, in nats."""

    def __init__(self, model: nn.Module, encoded: EncodedRows, table: pd.DataFrame, probe: DomainProbe) -> None:
        # Before the base's own outputs are computed with them.
        self.weights, self.bias = torch.from_numpy(probe.weights), torch.from_numpy(probe.bias)
        super().__init__(model, encoded, table)

    def outputs(self, inputs: Batch) -> Float[Tensor, "rows classes"]:
        """Return the log-probabilities of the probe's classes."""
        return F.log_softmax(pooled_states(self.model, inputs) @ self.weights + self.bias, -1)

    def measure(self, batch: Batch) -> Float[Tensor, "rows"]:
        """Measure the divergence of each row."""
        outputs = self.outputs(_inputs(batch))
        return F.kl_div(outputs, batch[self.reference], reduction="none", log_target=True).sum(-1)

    def count_targets(self, batch: Batch) -> Float[Tensor, "rows"]:
        return torch.ones(len(batch["labels"]))


class JointMeasure(RowMeasure):
    """Measures of the same rows from one pass of the model, which takes the time of one of them.

    Parameters
    ----------
    measures : sequence of RowMeasure
        Measures of one model on the same rows. Only the first one calls the model.
    """

    def __init__(self, measures: Sequence[RowMeasure]) -> None:
        self.first, *self.others = measures
        self.model, self.order, self.batched_rows = self.first.model, self.first.order, self.first.batched_rows
        self.batches = list(map(dict, self.first.batches))
        for other in self.others:
            for batch, other_batch in zip(self.batches, other.batches, strict=True):
                batch |= other_batch

    def measure(self, batch: Batch) -> Float[Tensor, "rows measures"]:
        """Measure a batch, with one column per measure."""
        with _LastPass(self.model) as last_pass:
            columns = [self.first.measure(batch).double()]
        for other in self.others:
            other.model = last_pass
            columns.append(other.measure(batch).double())
            other.model = self.model
        return torch.stack(columns, 1)


class _LastPass:
    """Stand-in for a model that repeats what the model and its body returned in their last pass in its context."""

    def __init__(self, model: Any) -> None:
        self.outputs: dict[nn.Module, Any] = {}
        # The loss needs the whole model, and the drift of an encoder what its head reads.
        self.modules = model, model.base_model

    def __enter__(self) -> Any:
        self.hooks = [module.register_forward_hook(self._keep) for module in {*self.modules}]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.outputs[module] = outputs

    def __call__(self, **inputs: Tensor) -> Any:
        return self.outputs[self.modules[0]]

    def base_model(self, **inputs: Tensor) -> Any:
        return self.outputs[self.modules[1]]


def pooled_states(model: Any, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows d"]:
    """Return the mean of a model's last hidden state over the tokens of each row, in float64."""
    states = model.base_model(**_inputs(inputs)).last_hidden_state.double()
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != states.shape[:2]:  # patches of an image
        return states.mean(1)
    weights = mask.double()
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


@torch.no_grad()
def state_rows(model: nn.Module, encoded: EncodedRows) -> Float[np.ndarray, "rows d"]:
    """Return the mean last hidden state of every row."""
    batched_rows = batch_by_length(encoded.lengths)
    states = torch.cat([pooled_states(model, encoded.batch(rows)) for rows in batched_rows]).numpy()
    ordered = np.empty_like(states)
    ordered[np.concatenate(batched_rows)] = states
    return ordered


def batch_by_length(lengths: Int[np.ndarray, "rows"]) -> list[Int[np.ndarray, "_"]]:
    """Divide rows into batches of similar length so that padding and batches together cost least.

    The cost of a batch is the tokens of its rows, padded to its longest row, and 32 more. No batch has more tokens than
    16 of the longest rows have. The cheapest division of the first rows follows from those of fewer rows.
    """
    order = np.argsort(lengths, kind="stable")
    padded = np.maximum(lengths[order], 1)
    most_tokens = BATCH * int(padded.max())
    costs, starts = np.zeros(len(order) + 1), np.zeros(len(order) + 1, int)
    for end in range(1, len(order) + 1):
        length = int(padded[end - 1])
        # The last batch has the rows from one of these on.
        first_rows = np.arange(max(0, end - most_tokens // length), end)
        totals = costs[first_rows] + (end - first_rows) * length + _TOKENS_PER_BATCH
        starts[end], costs[end] = first_rows[totals.argmin()], totals.min()
    batches, end = [], len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = starts[end]
    return batches[::-1]


def _inputs(batch: Mapping[str, Tensor]) -> Batch:
    """Return a batch without what the measures add to it; labels are not inputs."""
    return {key: value for key, value in batch.items() if key != "labels" and not key.startswith(_REFERENCE)}


def hash_rows(table: pd.DataFrame) -> str:
    """Return six hexadecimal digits of the SHA-256 of rows."""
    digest = hashlib.sha256()
    for row in _cells(table):
        digest.update(row.encode())
    return digest.hexdigest()[:6]


def _cells(table: pd.DataFrame) -> Iterator[str]:
    for values in table.drop(columns="cluster", errors="ignore").itertuples(index=False):
        yield repr(tuple(map(str, values)))
