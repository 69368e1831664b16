"""Which neurons training turned: scores of every neuron of the feed-forward parts, and the choice of k of them.

A neuron is one vector of weights: a row of an input or gate projection, a column of an output projection. Its score is
the cosine distance 1 - cos between its weights before and after, its place in the ranking that among *all* layers and
projections together.

Source: NeFT (arXiv 2403.11621), equation 1 and section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.names import position
from lorascope.update import neuron_cosine

COLUMNS = (
    "module",
    "stack",
    "layer",
    "role",
    "neuron",
    "cosine_distance",
    "norm_original",
    "norm_tuned",
    "delta_norm",
)
MODES = ("changed", "reversed", "random")


def table(
    module: str,
    stack: str,
    layer: int,
    role: str,
    original: Float[np.ndarray, "rows columns"],
    tuned: Float[np.ndarray, "rows columns"],
    axis: int,
) -> pd.DataFrame:
    """Scores of the neurons of one module.

    Parameters
    ----------
    module, stack, layer, role
        Where it stands, as in ``names.describe``.
    original, tuned : arrays (rows, columns)
        The weight before and after.
    axis : {0, 1}
        As in ``update.neuron_cosine``: 1 if neurons are rows, 0 if they are columns.

    Returns
    -------
    DataFrame
        The columns ``COLUMNS``, a row for each neuron: its 0-based number, 1 - cos (NaN for a neuron that is zero
        before or after, which has no direction), and the norms of its weights before, after and of their difference.
    """
    before, after = np.asarray(original, np.float64), np.asarray(tuned, np.float64)
    distance = neuron_cosine(before, after, axis)
    return pd.DataFrame(
        {
            "module": module,
            "stack": stack,
            "layer": pd.array([layer] * len(distance), dtype="Int16"),
            "role": role,
            "neuron": np.arange(len(distance), dtype=np.int32),
            "cosine_distance": distance,
            "norm_original": np.linalg.norm(before, axis=axis),
            "norm_tuned": np.linalg.norm(after, axis=axis),
            "delta_norm": np.linalg.norm(after - before, axis=axis),
        }
    )


def ranked(scores: pd.DataFrame) -> pd.DataFrame:
    """All neurons that have a direction, the most turned first, with their ``rank`` from 1 on.

    Equal distances go by place: stack, layer, role (input, gate, output), neuron. So the order is total, and does not
    depend on the order of the rows.
    """
    known = scores[scores["cosine_distance"].notna()]
    modules = known[["module", "stack", "layer", "role"]].drop_duplicates()
    places = {module: (position(*place), module) for module, *place in modules.itertuples(index=False)}
    order = {module: number for number, module in enumerate(sorted(places, key=places.__getitem__))}
    keys = [known["neuron"], known["module"].map(order), -known["cosine_distance"]]
    known = known.iloc[np.lexsort([key.to_numpy() for key in keys])].reset_index(drop=True)
    return known.assign(rank=np.arange(1, len(known) + 1, dtype=np.int32))


def select(scores: pd.DataFrame, k: int, mode: str = "changed", seed: int | Sequence[int] = 0) -> pd.DataFrame:
    """Choose exactly k neurons, of all layers and projections together.

    Parameters
    ----------
    scores : DataFrame
        ``module, stack, layer, role, neuron, cosine_distance`` and whatever else.
    k : int
    mode : {"changed", "reversed", "random"}
        ``changed``: the k with the largest cosine distance, which the paper calls sensitive. ``reversed``: the k at
        the other end of the same order, so that the two share none as long as 2k neurons are there. ``random``: k
        drawn by lot from those that could be chosen.
    seed : int or sequence of int
        Of the lot.

    Returns
    -------
    DataFrame
        The chosen rows in the order of choice, with their ``rank``.

    Raises
    ------
    ValueError
        There are fewer than k neurons with a direction, or nothing has turned, or the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: {', '.join(MODES)}")
    pool = ranked(scores)
    if not 0 <= k <= len(pool):
        raise ValueError(
            f"k {k} is no choice: give 0 to {len(pool)} neurons ({len(pool)} of {len(scores)} have a direction)"
        )
    if mode == "random":
        by_place = pool.sort_values(["module", "neuron"])
        drawn = np.random.default_rng(seed).choice(len(pool), size=k, replace=False)
        return by_place.iloc[drawn].reset_index(drop=True)
    if not (pool["cosine_distance"] > 0).any():
        raise ValueError("no neuron has turned between the two checkpoints: there is nothing to choose by")
    return (pool if mode == "changed" else pool.iloc[::-1]).head(k).reset_index(drop=True)


def count(share: float, parameters: int, width: int) -> int:
    """How many neurons of ``width`` weights hold this share of all parameters; the x of NeFT_x% is such a share."""
    return round(share * parameters / width)
