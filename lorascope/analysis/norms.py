"""Aggregation of per-module quantities: by layer and role, over steps, relative to step 0 and to the median block.

The functions chain: ``select_quantity`` takes rows of a records table, ``pool_modules`` aggregates them to cells, and
others summarize the cells over steps.
``place`` is a position on the layer axis: the number of a block, or the role of any other module.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lorascope.schema.module_roles import position
from lorascope.schema.records import QUANTITIES

LAYER = ("stack", "layer", "place")
_KEY = ["run", "step", "quantity"]


def select_quantity(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Select the rows of a norm, or another quantity, that belong to a module, and add their ``place`` as a category.

    Raises
    ------
    ValueError
        The table has no such row.
    """
    rows = table[(table["quantity"] == quantity) & (table["module"] != "")]
    if rows.empty:
        raise ValueError(f"cannot select {quantity}: the table has no row of it for any module")
    return rows.assign(place=layer_places(rows))


def layer_places(table: pd.DataFrame) -> pd.Series:
    """Compute the position of every row of norms on the layer axis: embed, (encoder) 0.., (decoder) 0.., head.

    Returns
    -------
    Series
        Ordered categorical over the places that occur; labels include the stack only if there are two stacks.
    """
    keys: list[tuple[str, int | None, str]] = []
    for stack, layer, role in zip(table["stack"], table["layer"], table["role"], strict=True):
        # NaN is not equal to itself, so it could not be found again as part of a key.
        keys.append((stack, None, role) if pd.isna(layer) else (stack, int(layer), role))
    spots = sorted(dict.fromkeys(keys), key=lambda key: position(*key))
    # With one stack its name would only repeat in every label.
    has_stacks = len({stack for stack, layer, _ in spots if layer is not None}) > 1
    labels = {}
    for stack, layer, role in spots:
        label = role if layer is None else str(layer)
        if has_stacks and stack:
            label = f"{stack} {label}"
        labels[stack, layer, role] = label
    categories = list(dict.fromkeys(labels.values()))
    return pd.Series(pd.Categorical([labels[key] for key in keys], categories, ordered=True), table.index)


def pool_modules(table: pd.DataFrame, by: Sequence[str] = LAYER) -> pd.DataFrame:
    """Aggregate norms or other quantities over the modules of a cell: root of summed squares, sum, or mean.

    No module is counted twice. The row of a whole block replaces the rows of its modules, unless ``by`` splits the
    block by role; then the row of the block is ignored. A cell with an unknown value is NaN.

    Parameters
    ----------
    table : DataFrame
        Rows from ``select_quantity``.
    by : sequence of str
        Columns that define a cell, in addition to run, step and quantity; by default the layer.

    Returns
    -------
    DataFrame
        ``run, step, quantity``, the columns ``by``, and ``value``: one row per cell.
    """
    if "module" not in by:  # with one module per cell nothing is summed
        block = table["role"] == "block"
        if "role" in by:
            table = table[~block]
        else:
            layers = table.assign(block=block).groupby([*_KEY, "stack", "layer"], observed=True, dropna=False)
            table = table[block | ~layers["block"].transform("any")]
    pooled_quantities = []
    for rule, rows in table.groupby(table["quantity"].map(lambda name: QUANTITIES[name].pool).astype("str")):
        if rule == "norm":  # the norm of several tensors is the norm of their concatenation, so squares are summed
            rows = rows.assign(value=rows["value"] ** 2)
        cells = rows.groupby([*_KEY, *by], observed=True, dropna=False, sort=False)["value"]
        pooled = cells.mean(skipna=False) if rule == "mean" else cells.sum(skipna=False)
        if rule == "norm":
            pooled = np.sqrt(pooled)
        pooled_quantities.append(pooled)
    return pd.concat(pooled_quantities).reset_index()


def norm_per_weight(table: pd.DataFrame, modules: pd.DataFrame) -> pd.DataFrame:
    """Compute the norm of each layer over the square root of its number of weights, to compare layers of any size.

    Parameters
    ----------
    table : DataFrame
        Rows from ``select_quantity`` with a norm of the weight or its update.
    modules : DataFrame
        Module table from ``module_table.describe``. Only matrices have a known size, so only these are included.
    """
    sizes = modules.astype({"module": "str"}).drop_duplicates("module").set_index("module")
    weights = table["module"].astype("str").map(sizes["out_features"] * sizes["in_features"]).astype("float64")
    sums = table.assign(square=table["value"] ** 2, weights=weights)[weights.notna()]
    cells = sums.groupby([*_KEY, *LAYER], observed=True, dropna=False, sort=False)[["square", "weights"]]
    pooled = cells.sum(min_count=1)  # a cell without known values stays NaN instead of 0
    return (pooled["square"] / pooled["weights"]).pow(0.5).rename("value").reset_index()


def last_recorded(table: pd.DataFrame) -> pd.DataFrame:
    """Return the norms, or other rows, at the last step that each run recorded, or all rows if no step is known."""
    # Adapter folders have no steps, so all their rows are final.
    final = table.groupby(["run", "quantity"], observed=True)["step"].transform("max")
    return table[(table["step"] == final).fillna(False) | (table["step"].isna() & final.isna())]


def mean_over_steps(cells: pd.DataFrame) -> pd.DataFrame:
    """Average the norm, or another quantity, of every cell over the recorded steps 1..T, without step 0.

    With ``weight_norm`` by layer this is LISA's w(l) (section 3.1).
    """
    rows = cells[(cells["step"] > 0).fillna(False)]
    groups = rows.groupby(_cell_columns(cells), observed=True, dropna=False, sort=False)["value"]
    return groups.mean().reset_index()


def _cell_columns(cells: pd.DataFrame) -> list[str]:
    return list(cells.columns.drop(["step", "value"]))


def percent_change(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the change of a norm, or another quantity, since step 0, in percent; NaN if that was unknown or zero."""
    key = _cell_columns(cells)
    start = cells.loc[(cells["step"] == 0).fillna(False), [*key, "value"]]
    matched = cells.merge(start, on=key, how="left", suffixes=("", "_start"))
    # A norm of zero at the start has no percentages.
    start_value = matched["value_start"].where(matched["value_start"] != 0).to_numpy(np.float64)
    return cells.assign(value=100 * (matched["value"].to_numpy(np.float64) / start_value - 1))
