"""Comparison of an adapter with its base weights: intruder dimensions and neuron rotation.

Weights are read one at a time. Intruder dimensions require all singular vectors of a weight, which takes minutes per
weight of a large model. By default they are computed only for small weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.runs.adapter import Adapter
from lorascope.schema.module_roles import parse
from lorascope.updates import Update
from lorascope.updates.linalg import one_thread

DIRECTIONS = 10
"""Number of leading singular vectors of each weight that are checked for intruder dimensions."""
SIDE = 1024
"""Smaller side up to which weights are decomposed by default, which takes about a second per weight."""
BASE_COLUMNS = ("intruders", "neuron_median", "neuron_largest")
_BY_COLUMN = ("ffn_out", "embed")  # a column is the output weights of a neuron, or the vector of a token


def compare_with_base(run: Adapter, decompose: bool) -> pd.DataFrame:
    """Compute intruder dimensions and neuron rotation of every module whose weight is in the base.

    Parameters
    ----------
    run : Adapter
        Adapter that was loaded with its base.
    decompose : bool
        Compute intruder dimensions for weights of any size.

    Returns
    -------
    DataFrame
        ``module, intruders, neuron_median, neuron_largest``. ``intruders`` is the number of singular vectors, among the
        10 leading ones, with a cosine below 0.5 to all of the base's; NaN if not computed. The others are the median
        and the maximum of 1 - cos between the weights of each neuron without and with the update. A neuron is a row;
        in ``ffn_out`` and embedding tables it is a column. All are NaN for an update with NaN.
    """
    rows: list[dict[str, Any]] = []
    with one_thread():
        for module, part in run.files.parts.items():
            if run.base is not None and run.base.has_weight(module):
                W0 = run.base.weight(module, part.shape, part.transposed)
                rows.append({"module": module} | _compare_module(W0, part.update(), module, decompose))
    return pd.DataFrame(rows, columns=["module", *BASE_COLUMNS])


def _compare_module(W0: Float[np.ndarray, "out in"], update: Update, module: str, decompose: bool) -> dict[str, float]:
    if not np.isfinite(update.norm()):
        return dict.fromkeys(BASE_COLUMNS, np.nan)
    rotation = update.neuron_change(W0, 0 if parse(module).role in _BY_COLUMN else 1).cosine_distance
    known = rotation[~np.isnan(rotation)]  # a zero neuron has no direction
    found = {"neuron_median": np.median(known), "neuron_largest": known.max()} if len(known) else {}
    if decompose or min(W0.shape) <= SIDE:
        # Import here: it loads scipy, a fifth of a second that only comparisons with a base need.
        from lorascope.analysis.intruders import Basis, intruders

        found["intruders"] = intruders({module: Basis.of(W0)}, {module: update}, DIRECTIONS)["intruder"].sum()
    return dict.fromkeys(BASE_COLUMNS, np.nan) | {name: float(value) for name, value in found.items()}
