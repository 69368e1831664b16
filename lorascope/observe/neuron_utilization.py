"""Observer of neuron utilization: correlation of hidden states with the weights of each neuron.

Source: NeFT (arXiv 2403.11621), section 6.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lorascope.adapters.delta import effective_weight, to_array
from lorascope.adapters.hidden_states import token_means
from lorascope.analysis import neurons
from lorascope.analysis.neuron_utilization import LAYERS, compared_layers, correlations
from lorascope.array_types import Float
from lorascope.methods.field_checks import require_choice, require_integer
from lorascope.methods.method import Batch, Step, added_later
from lorascope.observe.observer import Observer
from lorascope.schema.records import Quantity, Record, register

_SOURCE = "NeFT, section 6.1"
_LARGEST = "largest |Pearson correlation| of a neuron's weights with the mean output of a block"
register(
    "train with observe=[ls.observe.utilization()]",
    utilisation=Quantity("utilization", "", "neuron", "mean", _LARGEST, _SOURCE),
    utilisation_layer=Quantity(
        "most correlated block", "", "neuron", "mean", "block of the largest |correlation|", _SOURCE
    ),
)


@dataclass(kw_only=True)
class utilization(Observer):
    """Observer of neuron utilization: largest absolute correlation of weights with the mean hidden states.

    Hidden states are averaged over the tokens of each held-out row, then over rows. The paper generates the answers;
    here they are part of the rows. The last block's state is taken as the model returns it, in most model families
    after a norm. Weights include the adapter's update; input-dependent updates (HydraLoRA) are taken at mean gates.

    Parameters
    ----------
    size : int
        Number of rows of the validation split.
    layers : {"later", "earlier"}
        Blocks that a neuron's weights are compared with: its own and later ones, as in the authors' code, or its own
        and earlier ones, as in the text of the paper.
    standardize : bool
        Divide each coordinate of a block's mean state by its root mean square over the tokens, so that a few huge
        coordinates do not dominate.
    """

    every: int = 100
    size: int = 128
    layers: str = field(default="later", metadata=added_later())
    standardize: bool = field(default=False, metadata=added_later())

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(self, 1, "size")
        require_choice(self, "layers", LAYERS)

    def __call__(self, step: Step) -> Iterable[Record]:
        if not self.due(step.finished, step.total):
            return
        states = mean_states(step.model, step.held_out(self.size).batch, self.standardize)
        for group in neurons.list_groups(step.modules):
            vectors = to_array(effective_weight(step.model, group.module).float())[group.slices]
            blocks = compared_layers(group.layer, self.layers)
            # Encoders such as BERT return their hidden states without the name of a stack.
            hidden = states[group.stack if group.stack in states else ""][blocks]
            correlation = correlations(vectors if group.axis == 1 else vectors.T, hidden)
            numbers = np.arange(group.first, group.first + group.count)
            yield Record("utilisation", correlation.max(axis=1), group.module, numbers)
            yield Record("utilisation_layer", correlation.argmax(axis=1) + (blocks.start or 0), group.module, numbers)


def mean_states(model: nn.Module, batch: Batch, standardize: bool = False) -> dict[str, Float[np.ndarray, "layers d"]]:
    """Compute the mean output of every block for neuron utilization: over tokens of each row, then over the rows."""
    means = {stack: rows.mean(axis=0) for stack, rows in token_means(model, batch).items()}
    if not standardize:
        return means
    for stack, squares in token_means(model, batch, torch.square).items():
        root = np.sqrt(squares.mean(axis=0))
        # A coordinate that is zero for all tokens stays zero.
        means[stack] = np.divide(means[stack], root, out=np.zeros_like(root), where=root > 0)
    return means
