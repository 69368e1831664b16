"""An observer of neurons: how much the hidden states look like each one's weights.

Source: NeFT (arXiv 2403.11621), section 6.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorascope.analysis import neurons
from lorascope.analysis.utilisation import utilisation as largest_correlation
from lorascope.delta import adapted, host_weight, to_array
from lorascope.method import Batch, Step
from lorascope.observer import Observer
from lorascope.records import Quantity, Record, register

_STACKS = {"": "hidden_states", "encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states"}
_ROWS = 32  # passed through the model at once

register(
    "utilisation",
    Quantity(
        "utilisation",
        index="neuron",
        definition="largest |Pearson correlation| of its weights with the mean output of its own or a later block",
        source="NeFT, section 6.1",
    ),
)


@dataclass(kw_only=True)
class utilisation(Observer):
    """How much the mean hidden states look like the weights of each neuron of the feed-forward parts.

    The states are means over the tokens of held-out texts and then over the texts; the paper generates the answers,
    here they are given. The last block's state is taken as the model gives it, in most families after a norm.

    Parameters
    ----------
    size : int
        Rows of the validation split.
    """

    every: int = 100
    size: int = 128

    def __call__(self, step: Step) -> Iterable[Record]:
        if not self.due(step.finished, step.total):
            return
        states = mean_states(step.model, step.held_out(self.size).batch)
        deltas = adapted(step.model)
        for part in neurons.parts(step.modules):
            weight = host_weight(step.model.get_submodule(part.module)).detach()
            if part.module in deltas:
                weight = weight + deltas[part.module].weight().detach()
            vectors = to_array(weight.float())[part.where]
            used = largest_correlation(
                vectors if part.axis == 1 else vectors.T,
                states[part.stack if part.stack in states else ""][part.layer :],
            )
            yield Record("utilisation", used, part.module, np.arange(part.first, part.first + part.count))


@torch.no_grad()
def mean_states(model: nn.Module, batch: Batch) -> dict[str, Float[np.ndarray, "layers d"]]:
    """Output of every block by stack, mean over the tokens of each row and then over the rows."""
    training = model.training
    model.eval()
    rows = len(batch["attention_mask"])
    sums: dict[str, Any] = {}
    for start in range(0, rows, _ROWS):
        piece = {key: value[start : start + _ROWS] for key, value in batch.items()}
        output = model(**piece, output_hidden_states=True)
        for stack, name in _STACKS.items():
            if name in output:
                states = torch.stack(output[name][1:]).double()  # the first is the embedding
                sums[stack] = sums.get(stack, 0) + (states * _weights(states, piece["attention_mask"])).sum((1, 2))
    model.train(training)
    return {stack: to_array(total / rows) for stack, total in sums.items()}


def _weights(states: Float[Tensor, "layers rows tokens d"], mask: Int[Tensor, "rows given"]) -> Float[Tensor, "..."]:
    """What each token counts in the mean of its row; all of a decoder's own tokens count alike."""
    kept = mask.double() if mask.shape == states.shape[1:3] else states.new_ones(states.shape[1:3])
    return (kept / kept.sum(1, keepdim=True))[..., None]
