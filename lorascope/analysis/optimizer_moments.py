"""Second moments as matrices: how few directions carry them, and what rows and columns alone say of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.analysis.norms import last, place, select
from lorascope.analysis.seed_intervals import band

# Rows and columns are scaled in turn until their sums are met to this part, or so often.
_MET, _ROUNDS = 1e-6, 50


def rank_one(V: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
    """Adafactor's stand-in: sums of the rows times sums of the columns over the sum of all."""
    total = V.sum()
    return np.outer(V.sum(1), V.sum(0)) / total if total else np.zeros_like(V)


def relative_error(V: Float[np.ndarray, "m n"], stand_in: Float[np.ndarray, "m n"]) -> float:
    """|V - stand_in| / |V|, in Frobenius norm."""
    return float(np.linalg.norm(V - stand_in) / np.linalg.norm(V))


def tail(sigma: Float[np.ndarray, "k"], rank: int) -> float:
    """The least relative error of a rank: sqrt(sum_{i>rank} sigma_i^2 / sum sigma_i^2)."""
    return float(np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum()))


def same_marginals(V: Float[np.ndarray, "m n"], seed: int) -> Float[np.ndarray, "m n"]:
    """A random matrix with the sums by row and by column of V, and about as uneven beside them.

    What V is times its stand-in of rank one is dealt out among all entries by lot, and rows and columns are scaled to
    their sums again. It has every direction that V owes to its rows and columns alone, and no other but by chance.
    """
    alone = rank_one(V)
    ratio = np.divide(V, alone, out=np.zeros_like(V), where=alone > 0)
    dealt = alone.copy()
    live = alone > 0
    dealt[live] *= np.random.default_rng(seed).permutation(ratio[live])
    for _ in range(_ROUNDS):
        missed = 0.0
        for axis in (1, 0):
            sums, wanted = dealt.sum(axis, keepdims=True), V.sum(axis, keepdims=True)
            scale = np.divide(wanted, sums, out=np.ones_like(sums), where=sums > 0)
            missed = max(missed, float(np.abs(scale - 1).max()))
            dealt *= scale
        if missed < _MET:
            break
    return dealt


def by_layer(table: pd.DataFrame, quantity: str, most: int = 6, role: str | None = None) -> pd.DataFrame:
    """The last look at a quantity of modules with an index, averaged over the modules of a layer.

    Parameters
    ----------
    table : DataFrame
        As ``records.COLUMNS``, with ``recipe`` and ``kind``.
    quantity : str
    most : int
        Of more layers, so many are taken, evenly.
    role : str, optional
        Of these modules alone.

    Returns
    -------
    DataFrame
        ``run, recipe, kind, place, index, value``, one row a run, place of a layer (see ``norms.place``) and index.
    """
    rows = table[(table["quantity"] == quantity) & table["layer"].notna()]
    rows = rows[rows["step"] == rows.groupby("run", observed=True)["step"].transform("max")]
    if role is not None:
        rows = rows[rows["role"] == role]
    rows = rows.assign(place=place(rows))
    layers = rows["place"].cat.categories
    kept = {layers[round(at)] for at in np.linspace(0, len(layers) - 1, min(most, len(layers)))}
    rows = rows[rows["place"].isin(list(kept))]
    keys = ["run", "recipe", "kind", "place", "index"]
    return rows.groupby(keys, observed=True)["value"].mean().reset_index()


def final(table: pd.DataFrame, quantity: str) -> pd.Series:
    """The last value of a quantity by module, or by module and index where it has one."""
    rows = table[table["quantity"] == quantity]
    rows = rows[rows["step"] == rows["step"].max()]
    keys = ["module"] if rows["index"].isna().all() else ["module", "index"]
    return rows.set_index(keys)["value"]


def ranks(table: pd.DataFrame) -> pd.DataFrame:
    """Ranks of the factors in the blocks, beside the most that a choice may take.

    Parameters
    ----------
    table : DataFrame
        As ``records.COLUMNS``, of Adapprox.

    Returns
    -------
    DataFrame
        Rows of ``factor_rank`` with their ``place``, and with ``share`` and ``cap``: k / k_max and k_max.
    """
    keys = ["run", "module", "step"]
    found, shares = (select(table, name).dropna(subset="layer") for name in ("factor_rank", "factor_share"))
    found = found.merge(shares[[*keys, "value"]].rename(columns={"value": "share"}), on=keys)
    return found.assign(cap=(found["value"] / found["share"]).round())


def factorings(table: pd.DataFrame, ways: Mapping[str, str]) -> pd.DataFrame:
    """Error and time of ways to factor, at the last look.

    Parameters
    ----------
    table : DataFrame
        As ``records.COLUMNS``, of ``observe.factorings``.
    ways : mapping way -> label
        The exact one, "svd", among them.

    Returns
    -------
    DataFrame
        ``run, index, measure, excess, seconds``: index is the rank and measure the label; excess is the mean error over
        the matrices, over that of the exact way; seconds are of all matrices.
    """
    rows = last(table[table["quantity"].str.startswith("factoring_")])
    cells = rows.groupby(["run", "index", "quantity"], observed=True)["value"].agg(["mean", "sum"]).unstack("quantity")
    errors, seconds = cells["mean"], cells["sum"]
    found = [
        pd.DataFrame(
            {
                "measure": label,
                "excess": errors[f"factoring_error_{way}"] / errors["factoring_error_svd"],
                "seconds": seconds[f"factoring_seconds_{way}"],
            }
        )
        for way, label in ways.items()
    ]
    return pd.concat(found).reset_index()


def rates(table: pd.DataFrame, rate: Mapping[str, float]) -> dict[str, pd.DataFrame]:
    """Validation and test loss at the end, by method and rate.

    Parameters
    ----------
    table : DataFrame
        As ``records.COLUMNS``, with ``recipe``; what stands in it before " at " is the method.
    rate : mapping run id -> learning rate

    Returns
    -------
    dict quantity -> DataFrame
        ``method, lr``, and mean and interval as ``seed_intervals.band`` gives them.
    """
    names = table["recipe"].astype("str")
    methods = names.str.rpartition(" at ")[0]
    table = table.assign(method=methods.where(methods != "", names))
    found = {}
    for quantity in ("eval_loss", "test_loss"):
        rows = table[table["quantity"] == quantity]
        rows = rows[rows["step"] == rows.groupby("run", observed=True)["step"].transform("max")]
        cells = band(rows.assign(lr=rows["run"].astype("str").map(rate)), ["method", "lr"])
        found[quantity] = cells.sort_values(["method", "lr"], kind="stable", key=_sort_names).reset_index(drop=True)
    return found


def best(cells: pd.DataFrame) -> pd.DataFrame:
    """The rate of the lowest mean of each method: ``method, lr``."""
    return cells.loc[cells.groupby("method", sort=False)["value"].idxmin(), ["method", "lr"]].reset_index(drop=True)


def _sort_names(column: pd.Series) -> pd.Series:
    """Names as they come, numbers by size."""
    return pd.Series(pd.factorize(column)[0], index=column.index) if column.name == "method" else column
