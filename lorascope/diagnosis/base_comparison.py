"""An adapter beside the weights it is added to: intruder dimensions, and how far it turns the neurons.

Weights are read one at a time. Intruders need all singular vectors of a weight, minutes for each of a large model, so
that they are looked for in small ones unless asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.runs.loading import AdapterRun
from lorascope.schema.module_roles import parse
from lorascope.updates.linalg import as_float64, one_thread
from lorascope.updates.low_rank import Dense, LowRank, NeuronChange, factored_change, neuron_change

DIRECTIONS = 10
"""Leading directions of each weight that are looked at for intruders."""
SIDE = 1024
"""Smaller side up to which weights are decomposed without being asked to: a second each."""
BESIDE = ("intruders", "neuron_median", "neuron_largest")
_BY_COLUMN = ("ffn_out", "embed")  # a neuron's output weights, a token's vector


def against_base(run: AdapterRun, decompose: bool) -> pd.DataFrame:
    """Intruders and turned neurons of every module whose weight the base holds.

    Parameters
    ----------
    run : AdapterRun
        Opened with its base.
    decompose : bool
        Look for intruders in weights of any size.

    Returns
    -------
    DataFrame
        ``module, intruders`` (of the 10 leading directions, those with a cosine below 0.5 to all of the base's; NaN
        where they were not looked for), ``neuron_median, neuron_largest`` (of 1 - cos between each neuron's weights
        without and with the update; a neuron is a row, in ffn_out and tables a column). NaN for an update that holds
        NaN.
    """
    rows: list[dict[str, Any]] = []
    with one_thread():
        for module, part in run.files.parts.items():
            if run.base is not None and run.base.has_weight(module):
                W0 = run.base.weight(module, part.shape, part.transposed)
                rows.append({"module": module} | _compare_module(W0, part.update(), module, decompose))
    return pd.DataFrame(rows, columns=["module", *BESIDE])


def _compare_module(
    W0: Float[np.ndarray, "out in"], update: LowRank | Dense, module: str, decompose: bool
) -> dict[str, float]:
    if not np.isfinite(update.norm()):
        return dict.fromkeys(BESIDE, np.nan)
    turned = _rotation_summary(W0, update, 0 if parse(module).role in _BY_COLUMN else 1).cosine_distance
    known = turned[~np.isnan(turned)]  # a neuron without weights has no direction
    told = {"neuron_median": np.median(known), "neuron_largest": known.max()} if len(known) else {}
    if decompose or min(W0.shape) <= SIDE:
        # Brings scipy along, a fifth of a second that those without a base need not wait.
        from lorascope.analysis.intruders import Basis, intruders

        told["intruders"] = intruders({module: Basis.of(W0)}, {module: update}, DIRECTIONS)["intruder"].sum()
    return dict.fromkeys(BESIDE, np.nan) | {name: float(value) for name, value in told.items()}


def _rotation_summary(W0: Float[np.ndarray, "out in"], update: LowRank | Dense, axis: int) -> NeuronChange:
    if isinstance(update, LowRank):
        return factored_change(W0, update.scale * as_float64(update.B), update.A, axis)
    return neuron_change(W0, update.dense() + W0, axis)
