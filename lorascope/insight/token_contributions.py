"""Margin of the labels, and the contributions of components to it at every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorascope.adapters.activation_patching import Batch, replaced_forwards
from lorascope.array_types import Float
from lorascope.inputs.tokenization import IGNORED, align_targets
from lorascope.insight.update_parts import PartDirections
from lorascope.observe.measured_rows import RowMeasure

MARKS = "marks"
"""Key of a batch with the words after whose occurrences outputs are compared."""


class Margin(RowMeasure):
    """Margin of the label: its logit minus the log-sum-exp of all other logits, in nats, summed over a row's targets.

    It is the log odds of the label.
    """

    def measure(self, batch: Batch) -> Float[Tensor, "rows"]:
        """Measure the margin of a batch."""
        logits, labels = self.model(**model_inputs(batch)).logits, batch["labels"]
        if labels.ndim == 1:
            rows = torch.arange(len(labels))
        else:
            logits, labels = align_targets(logits, labels, self.shifted)
            is_target = labels != IGNORED
            # A row of a language model has as many targets as its response has tokens.
            rows = is_target.nonzero()[:, 0]
            logits, labels = logits[is_target], labels[is_target]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        label = labels[:, None]
        margins = logits.gather(1, label)[:, 0] - logits.scatter(1, label, -torch.inf).logsumexp(1)
        return margins.new_zeros(len(batch["labels"])).index_add(0, rows, margins)


def model_inputs(batch: Mapping[str, Tensor]) -> Batch:
    """Return a batch without labels and marks, which are not inputs of the model."""
    return {key: value for key, value in batch.items() if key not in ("labels", MARKS)}


class TracedCall(NamedTuple):
    """Input of one call of a module, and a zero that was added to its output."""

    inputs: Tensor
    shift: Tensor


@contextmanager
def traced_calls(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, list[TracedCall]]]:
    """Record the calls of modules in this context; a shift has the gradient of the output."""
    calls: dict[str, list[TracedCall]] = {module: [] for module in modules}
    forwards = {}
    for module in calls:
        host = model.get_submodule(module)
        forwards[host] = partial(_traced_output, host.forward, calls[module])
    with replaced_forwards(forwards):
        yield calls


def _traced_output(forward: Callable[[Tensor], Tensor], calls: list[TracedCall], x: Tensor) -> Tensor:
    output = forward(x)
    # A leaf, because the output itself has a gradient only if something above it does.
    shift = torch.zeros_like(output, requires_grad=True)
    calls.append(TracedCall(x.detach(), shift))
    return output + shift


class TokenContributions(NamedTuple):
    """Activations and contributions of components at each token."""

    activations: Float[Tensor, "*tokens k"]
    contributions: Float[Tensor, "*tokens k"]


def contribute(directions: PartDirections, x: Tensor, gradient: Float[Tensor, "*tokens out"]) -> TokenContributions:
    """Return ``a = size * v^T x`` and ``a * u^T g`` of rank-one components for a module's input x and gradient g."""
    # The input of an embedding is an id, the number of a row of V.
    projected = x @ directions.V if x.is_floating_point() else F.embedding(x, directions.V)
    # Two low-rank factors, because the update of a token is never needed as a matrix.
    activations = projected * directions.size
    return TokenContributions(activations, activations * (gradient @ directions.U))
