"""Comparison of an adapter with its base weights: intruder dimensions and neuron rotation.

Weights are read one at a time. Intruder dimensions require all singular vectors of a weight, which takes minutes per
weight of a large model. By default they are computed only for small weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.stored_update import StoredUpdate
from lorascope.schema.module_roles import parse
from lorascope.updates.linalg import one_thread

DIRECTIONS = 10
"""Number of leading singular vectors of each weight that are checked for intruder dimensions."""
SIDE = 1024
"""Smaller side up to which weights are decomposed by default, which takes about a second per weight."""
_BY_COLUMN = ("ffn_out", "embed")  # a column is the output weights of a neuron, or the vector of a token


class BaseChange(NamedTuple):
    """Change of a weight from its base by the update: intruder dimensions and rotation of neurons.

    ``intruders`` is the number of singular vectors, among the 10 leading ones, with a cosine below 0.5 to all of the
    base's; NaN if not computed. The others are the median and the maximum of 1 - cos between the weights of each neuron
    without and with the update. A neuron is a row; in ``ffn_out`` and embedding tables it is a column.
    """

    intruders: float = np.nan
    neuron_median: float = np.nan
    neuron_largest: float = np.nan


def compare_with_base(
    stored_updates: Mapping[str, StoredUpdate], base: PretrainedWeights | None, decompose: bool
) -> dict[str, BaseChange]:
    """Compute the change from the base of every module in it: intruder dimensions and neuron rotation.

    ``decompose`` computes intruder dimensions for weights of any size. All values of an update with NaN are NaN.
    """
    changes = {}
    with one_thread():
        for module, stored in stored_updates.items():
            if base is None or not base.has_weight(module):
                continue
            W0, update = base.weight(module, stored.shape, stored.transposed), stored.update()
            intruder_count = median = largest = np.nan
            if np.isfinite(update.norm()):
                axis = 0 if parse(module).role in _BY_COLUMN else 1
                distances = update.neuron_change(W0, axis).cosine_distance
                distances = distances[~np.isnan(distances)]  # a zero neuron has no direction
                if len(distances):
                    median, largest = np.median(distances), distances.max()
                if decompose or min(W0.shape) <= SIDE:
                    # Import here: it loads scipy, a fifth of a second that only comparisons with a base need.
                    from lorascope.analysis.intruders import Basis, find_intruders

                    table = find_intruders({module: Basis.of(W0)}, {module: update}, DIRECTIONS)
                    intruder_count = table["intruder"].sum()
            changes[module] = BaseChange(float(intruder_count), float(median), float(largest))
    return changes
