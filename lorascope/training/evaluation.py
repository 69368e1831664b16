"""Loss and metric of a model on tokenised rows, row by row, so that groups can be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lorascope.inputs.tokenization import IGNORED, EncodedRows


@dataclass(frozen=True, eq=False)
class Score:
    """What an evaluation found.

    Parameters
    ----------
    name : {"accuracy", "perplexity"}
        The metric.
    nll : array (rows,)
        Negative log-likelihood of each row, nats: of its class, or the sum over its counted tokens.
    counts : array (rows,)
        Counted tokens of each row; 1 for a class.
    correct : array (rows,) or None
        Whether the model prefers the right class or response, where there is a closed set of them.
    row_groups : list of str or None
        Group of each row.
    """

    name: str
    nll: Float[np.ndarray, "rows"]
    counts: Int[np.ndarray, "rows"]
    correct: Bool[np.ndarray, "rows"] | None
    row_groups: list[str] | None

    @property
    def loss(self) -> float:
        """Mean over all counted rows or tokens, nats."""
        return float(self.nll.sum() / self.counts.sum())

    @property
    def metric(self) -> float:
        """Accuracy, or the perplexity of the counted tokens."""
        return self._metric(np.ones(len(self.nll), dtype=bool))

    @property
    def higher_is_better(self) -> bool:
        """True for accuracy."""
        return self.correct is not None

    @property
    def groups(self) -> dict[str, float]:
        """The metric within each group, by name; empty where there are none."""
        names = np.array(self.row_groups or [])
        return {str(name): self._metric(names == name) for name in np.unique(names)}

    def _metric(self, rows: Bool[np.ndarray, "rows"]) -> float:
        if self.correct is not None:
            return float(self.correct[rows].mean())
        loss = float(self.nll[rows].sum() / self.counts[rows].sum())
        return math.exp(loss) if loss < 700 else math.inf


def evaluate(
    model: nn.Module,
    encoded: EncodedRows,
    device: str | torch.device = "cpu",
    limit: int | None = None,
    batch_size: int = 64,
) -> Score:
    """Evaluate without gradients or dropout; the model's mode is put back.

    The loss is the cross-entropy alone, whatever a model adds to its own. With a closed set of responses a row is
    correct when, of the tokens in which the responses part, the right one has the largest logit: one forward pass, and
    for responses of one token the same as comparing their probabilities.

    Parameters
    ----------
    model : Module
        With the head that the rows were encoded for.
    encoded : Encoded
        The rows.
    device : str or device
        Where the model is.
    limit : int, optional
        The first so many rows alone; a task's rows stand in the order of a hash.
    batch_size : int
        Rows a forward pass; rows of like length go together.
    """
    total = len(encoded) if limit is None else min(limit, len(encoded))
    order = np.argsort(encoded.lengths[:total], kind="stable")
    nll, counts, correct = np.zeros(total), np.ones(total, dtype=np.int64), np.zeros(total, dtype=bool)
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, total, batch_size):
            rows = order[start : start + batch_size]
            batch = {key: value.to(device) for key, value in encoded.batch(rows).items()}
            if encoded.classes is not None:
                nll[rows], correct[rows] = _score_classes(model, batch)
            else:
                nll[rows], counts[rows], correct[rows] = _score_tokens(model, batch, encoded, rows)
    model.train(training)
    closed = encoded.classes is not None or encoded.choices is not None
    groups = None if encoded.groups is None else encoded.groups[:total]
    return Score("accuracy" if closed else "perplexity", nll, counts, correct if closed else None, groups)


def _score_classes(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, Any]:
    labels = batch.pop("labels")
    logits = model(**batch).logits.float()
    nll = F.cross_entropy(logits, labels, reduction="none")
    return nll.cpu().numpy(), (logits.argmax(-1) == labels).cpu().numpy()


def _score_tokens(
    model: nn.Module, batch: dict[str, Tensor], encoded: EncodedRows, rows: Int[np.ndarray, "batch"]
) -> tuple[Any, Any, Any]:
    labels = batch["labels"]
    if encoded.shifted:
        del batch["labels"]  # a causal LM would compute the loss of all positions for nothing
    logits = model(**batch).logits
    if encoded.shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    nll = torch.zeros(labels.shape, device=labels.device)
    nll[counted] = F.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
    correct = np.zeros(len(rows), dtype=bool)
    if encoded.choices is not None:
        where = counted.int().argmax(1) + encoded.choices.offset
        there = logits[torch.arange(len(rows), device=labels.device), where]
        favourite = there[:, torch.from_numpy(encoded.choices.tokens).to(labels.device)].argmax(-1)
        correct = favourite.cpu().numpy() == encoded.choices.answers[rows]
    return nll.sum(1).double().cpu().numpy(), counted.sum(1).cpu().numpy(), correct
