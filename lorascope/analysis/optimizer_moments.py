"""Low-rank structure of second moments: errors of rank-k and row-column approximations, ranks, and learning rates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lorascope.analysis.even_spacing import evenly_spaced
from lorascope.analysis.norms import last_recorded, layer_places, select_quantity
from lorascope.array_types import Float

# Rows and columns are rescaled alternately, up to this relative error of their sums or this many times.
_TOLERANCE, _MAX_ITERATIONS = 1e-6, 50


def rank_one(V: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
    """Approximate an optimizer moment V by Adafactor's rank one: row times column sums over the sum; 0 if V is 0."""
    total = V.sum()
    return np.outer(V.sum(1), V.sum(0)) / total if total else np.zeros_like(V)


def frobenius_error(V: Float[np.ndarray, "m n"], stand_in: Float[np.ndarray, "m n"]) -> float:
    """Compute the error ``|V - stand_in| / |V|`` of an approximated optimizer moment in Frobenius norm."""
    return float(np.linalg.norm(V - stand_in) / np.linalg.norm(V))


def tail_error(sigma: Float[np.ndarray, "k"], rank: int) -> float:
    """Compute the best relative error of an optimizer moment by rank: sqrt(sum_{i>rank} sigma_i^2 / sum sigma_i^2)."""
    return float(np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum()))


def same_marginals(V: Float[np.ndarray, "m n"], seed: int) -> Float[np.ndarray, "m n"]:
    """Draw a random optimizer moment with the row and column sums of V and a similar spread around its rank one.

    The ratios of V to its rank-one approximation are permuted at random over the entries. Then rows and columns are
    rescaled to their sums. Only the directions that follow from V's row and column sums are not random.
    """
    approximation = rank_one(V)
    live = approximation > 0
    ratio = np.divide(V, approximation, out=np.zeros_like(V), where=live)
    shuffled = approximation.copy()
    shuffled[live] *= np.random.default_rng(seed).permutation(ratio[live])
    for _ in range(_MAX_ITERATIONS):  # rescaling the columns changes the row sums again, so both are repeated
        error = 0.0
        for axis in (1, 0):
            sums, target = shuffled.sum(axis, keepdims=True), V.sum(axis, keepdims=True)
            scale = np.divide(target, sums, out=np.ones_like(sums), where=sums > 0)
            error = max(error, float(np.abs(scale - 1).max()))
            shuffled *= scale
        if error < _TOLERANCE:
            break
    return shuffled


def average_by_layer(table: pd.DataFrame, quantity: str, role: str | None = None) -> pd.DataFrame:
    """Return last values of an indexed quantity of optimizer moments, averaged over the modules of a layer.

    At most six layers are included, evenly spaced.

    Parameters
    ----------
    table : DataFrame
        Records with ``records.COLUMNS``, ``recipe`` and ``kind``.
    quantity : str
        Name of the quantity.
    role : str, optional
        Role of the modules to include, by default all.

    Returns
    -------
    DataFrame
        ``run, recipe, kind, place, index, value``, one row per run, place (see ``norms.layer_places``) and index.
    """
    rows = last_recorded(table[(table["quantity"] == quantity) & table["layer"].notna()])
    if role is not None:
        rows = rows[rows["role"] == role]
    rows = rows.assign(place=layer_places(rows))
    rows = rows[rows["place"].isin(evenly_spaced(list(rows["place"].cat.categories), 6))]
    keys = ["run", "recipe", "kind", "place", "index"]
    return rows.groupby(keys, observed=True)["value"].mean().reset_index()


def factor_ranks(table: pd.DataFrame) -> pd.DataFrame:
    """Return the factor ranks of Adapprox's second moments in the blocks, with the largest rank allowed.

    Returns
    -------
    DataFrame
        Records of ``factor_rank`` with their ``place``, ``share`` (k / k_max) and ``cap`` (k_max).
    """
    keys = ["run", "module", "step"]
    ranks, shares = (select_quantity(table, name).dropna(subset="layer") for name in ("factor_rank", "factor_share"))
    ranks = ranks.merge(shares[[*keys, "value"]].rename(columns={"value": "share"}), on=keys)
    return ranks.assign(cap=(ranks["value"] / ranks["share"]).round())


def compare_factorings(table: pd.DataFrame, ways: Mapping[str, str]) -> pd.DataFrame:
    """Compare error and time of factorizations of optimizer moments at the last recording of ``observe.factorings``.

    Parameters
    ----------
    table : DataFrame
        Records of the runs.
    ways : mapping method -> label
        Factorization methods to compare; "svd", the exact one, must have been recorded.

    Returns
    -------
    DataFrame
        ``run, index, measure, excess, seconds``: index is the rank and measure the label; excess is the mean error over
        the matrices divided by the error of the SVD; seconds is the total time over the matrices.
    """
    rows = last_recorded(table[table["quantity"].str.startswith("factoring_")])
    cells = rows.groupby(["run", "index", "quantity"], observed=True)["value"].agg(["mean", "sum"]).unstack("quantity")
    errors, seconds = cells["mean"], cells["sum"]
    tables = []
    for way, label in ways.items():
        excess = errors[f"factoring_error_{way}"] / errors["factoring_error_svd"]
        columns = {"measure": label, "excess": excess, "seconds": seconds[f"factoring_seconds_{way}"]}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables).reset_index()
