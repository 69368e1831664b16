"""An observer of neurons: how much the hidden states look like each one's weights.

Source: NeFT (arXiv 2403.11621), section 6.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from lorascope.adapters.delta import effective_weight, to_array
from lorascope.adapters.hidden_states import token_means
from lorascope.analysis import neurons
from lorascope.analysis.neuron_utilization import LAYERS, correlations, span
from lorascope.methods.base import Batch, Step, added_later
from lorascope.observe.base import Observer
from lorascope.schema.deprecation import accept_old_fields, formerly
from lorascope.schema.records import Quantity, Record, register

_SOURCE = "NeFT, section 6.1"
register(
    "utilisation",
    Quantity(
        "utilisation",
        index="neuron",
        definition="largest |Pearson correlation| of its weights with the mean output of a block",
        source=_SOURCE,
    ),
)
register(
    "utilisation_layer",
    Quantity("most alike block", index="neuron", definition="the block of that correlation", source=_SOURCE),
)


@accept_old_fields
@dataclass(kw_only=True)
class utilization(Observer):
    """How much the mean hidden states look like the weights of each neuron of the feed-forward parts.

    The states are means over the tokens of held-out texts and then over the texts; the paper generates the answers,
    here they are given. The last block's state is taken as the model gives it, in most families after a norm. Weights
    are those with an adapter's update, which counts at mean gates where it depends on its input (HydraLoRA's).

    Parameters
    ----------
    size : int
        Rows of the validation split.
    layers : {"later", "earlier"}
        Blocks that a neuron's weights are held against: from its own on, as in the authors' code, or up to its own, as
        the paper's text has it.
    standardize : bool
        Divide each coordinate of a block's mean state by its root mean square over the tokens, so that a few huge ones
        do not decide alone.
    """

    stored_name: ClassVar[str] = "utilisation"

    every: int = 100
    size: int = 128
    layers: str = field(default="later", metadata=added_later())
    standardize: bool = field(default=False, metadata=added_later() | formerly("standardise"))

    def __post_init__(self) -> None:
        if self.layers not in LAYERS:
            raise ValueError(f"layers {self.layers!r} is unknown: {', '.join(LAYERS)}")

    def __call__(self, step: Step) -> Iterable[Record]:
        if not self.due(step.finished, step.total):
            return
        states = mean_states(step.model, step.held_out(self.size).batch, self.standardize)
        for part in neurons.parts(step.modules):
            vectors = to_array(effective_weight(step.model, part.module).float())[part.where]
            blocks = span(part.layer, self.layers)
            hidden = states[part.stack if part.stack in states else ""][blocks]
            alike = correlations(vectors if part.axis == 1 else vectors.T, hidden)
            numbers = np.arange(part.first, part.first + part.count)
            yield Record("utilisation", alike.max(axis=1), part.module, numbers)
            yield Record("utilisation_layer", alike.argmax(axis=1) + (blocks.start or 0), part.module, numbers)


def mean_states(model: nn.Module, batch: Batch, standardise: bool = False) -> dict[str, Float[np.ndarray, "layers d"]]:
    """Output of every block by stack, mean over the tokens of each row and then over the rows."""
    means = {stack: rows.mean(axis=0) for stack, rows in token_means(model, batch).items()}
    if not standardise:
        return means
    roots = {stack: np.sqrt(rows.mean(axis=0)) for stack, rows in token_means(model, batch, torch.square).items()}
    return {s: np.divide(mean, roots[s], out=np.zeros_like(mean), where=roots[s] > 0) for s, mean in means.items()}
