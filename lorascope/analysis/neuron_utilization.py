"""Neuron utilization: the correlation of hidden states with a neuron's weights, and how training shifts its ranking.

    utilization of neuron n of layer i = max over layers a >= i of |Pearson(w_n, h_a)|,

the correlation across the coordinates of the hidden state, where h_a is the mean output of block a. Neurons are ranked
by utilization, the most used first, separately for each role of a projection.

Source: NeFT (arXiv 2403.11621), sections 6.1-6.3, figures 2, 4 and 5.

The authors' code uses the layers a >= i. The paper's text states the preceding layers: ``layers="earlier"`` uses
a <= i, so that the first layer has a hidden state to compare.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.analysis.norms import last_recorded
from lorascope.array_types import Float

_EDGES = (0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 1)
# The paper's threshold: 100,000 of the 352,256 utilization ranks of a projection of LLaMA-2-7B.
STRONG = 100_000 / 352_256
KEY = ["module", "role", "neuron"]
LAYERS = ("later", "earlier")


def compared_layers(layer: int, layers: str = "later") -> slice:
    """Return the blocks whose hidden states give the utilization of a neuron of this block, its own included."""
    return slice(layer, None) if layers == "later" else slice(layer + 1)


def correlations(
    vectors: Float[np.ndarray, "neurons d"], hidden: Float[np.ndarray, "layers d"]
) -> Float[np.ndarray, "neurons layers"]:
    """Compute absolute correlations (Pearson) of weight vectors and hidden states for neuron utilization."""
    return np.abs(_standardize_rows(vectors) @ _standardize_rows(hidden).T)


def _standardize_rows(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    centered = np.asarray(rows, np.float64) - np.mean(rows, axis=1, keepdims=True, dtype=np.float64)
    norms = np.linalg.norm(centered, axis=1, keepdims=True)
    return np.divide(centered, norms, out=np.zeros_like(centered), where=norms > 0)


def compute_rank_shift(studied: pd.DataFrame, reference: pd.DataFrame, trained: pd.DataFrame) -> pd.DataFrame:
    """Compute the shift of each neuron's utilization rank between two models, and classify large ones.

    Parameters
    ----------
    studied, reference : DataFrame
        ``module, role, neuron, value``: utilization in the two models.
    trained : DataFrame
        ``module, neuron``: neurons trained in the studied model.

    Returns
    -------
    DataFrame
        ``module, role, neuron, rank_1`` (studied), ``rank_2`` (reference), ``d_rank`` (rank_2 - rank_1), ``percentile``
        (of rank_2 in its role, from 0), and three flags: ``strong``, shifted by at least ``STRONG`` of the ranks of its
        role; ``suppressed``, strong and less used in the studied model; ``indirect``, strong and not trained there. A
        neuron can be both suppressed and indirect.
    """
    first, second = (  # utilization ranks within the role, from 1 (most used); ties are in row order
        rows.groupby("role", observed=True)["value"].rank(method="first", ascending=False).astype("int64")
        for rows in (studied, reference)
    )
    neurons = studied.assign(rank_1=first).merge(reference.assign(rank_2=second), on=KEY)
    size = neurons.groupby("role", observed=True)["rank_1"].transform("size")
    shift = neurons["rank_2"] - neurons["rank_1"]
    strong = shift.abs() >= STRONG * size  # the paper's threshold, as a fraction of the ranks of the role
    identities, trained_identities = (
        pd.MultiIndex.from_frame(rows[["module", "neuron"]].astype({"module": "str", "neuron": "int64"}))
        for rows in (neurons, trained)
    )
    return neurons[[*KEY, "rank_1", "rank_2"]].assign(
        d_rank=shift,
        percentile=(neurons["rank_2"] - 1) / size,
        strong=strong,
        suppressed=strong & (shift < 0),
        indirect=strong & ~identities.isin(trained_identities),
    )


def rank_shift_of_run(
    table: pd.DataFrame, trained: pd.DataFrame, reference: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Compute the shift of neurons' utilization ranks from step 0, or from another run, to a run's last recorded step.

    Parameters
    ----------
    table : DataFrame
        Records of ``utilisation``; without a reference they must include step 0.
    trained : DataFrame
        ``module, neuron``: neurons that the run trained.
    reference : DataFrame, optional
        Records of ``utilisation`` of another run on the same model and text.
    """
    utilization = _utilization_rows(table)
    before = utilization[utilization["step"] == 0]
    if reference is not None:
        before = last_recorded(_utilization_rows(reference))
    columns = [*KEY, "value"]
    return compute_rank_shift(last_recorded(utilization)[columns], before[columns], trained)


def _utilization_rows(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[table["quantity"] == "utilisation"].rename(columns={"index": "neuron"})
    return rows.astype({"module": "str", "role": "str"})


def average_shifts(shifts: pd.DataFrame) -> pd.DataFrame:
    """Compute the mean shift of utilization ranks by percentile of the neuron in the reference, and over all neurons.

    Returns
    -------
    DataFrame
        ``low, high, value, n``: a row for each nonempty bucket, then one for all neurons, from 0 to 1.
    """
    # Percentiles are below 1, so half-open buckets include every neuron.
    bins = pd.cut(shifts["percentile"], list(_EDGES), right=False, labels=False)
    moved = shifts["d_rank"].abs()
    buckets = moved.groupby(bins).agg(value="mean", n="size").rename_axis("bucket").reset_index()
    bucket, edges = buckets["bucket"].astype(int).to_numpy(), np.array(_EDGES, float)
    buckets = buckets.assign(low=edges[bucket], high=edges[bucket + 1])
    overall = pd.DataFrame({"low": [0.0], "high": [1.0], "value": [moved.mean()], "n": [len(moved)]})
    return pd.concat([buckets[list(overall)], overall], ignore_index=True)


def count_shifts(shifts: pd.DataFrame) -> dict[str, float]:
    """Count the neurons with each kind of shift of their utilization rank, and compute the mean ``|d_rank|``."""
    kinds = {kind: int(shifts[kind].sum()) for kind in ("strong", "suppressed", "indirect")}
    return {**kinds, "avg_abs_d_rank": float(shifts["d_rank"].abs().mean())}
