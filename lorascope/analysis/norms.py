"""Where the norm is: modules pooled to layers and roles, over steps, against the start and against the median block.

The functions chain: ``select`` rows of a records table, ``pool`` them into cells, then look at the cells over steps.
``place`` is a position on the layer axis: a block by its number, anything else by its role.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorascope.schema.module_roles import position
from lorascope.schema.records import QUANTITIES

LAYER = ("stack", "layer", "place")
_KEY = ["run", "step", "quantity"]


def select(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Rows of one quantity that belong to a module, with their ``place`` as an ordered category.

    Raises
    ------
    ValueError
        The table has no such row.
    """
    rows = table[(table["quantity"] == quantity) & (table["module"] != "")]
    if rows.empty:
        raise ValueError(f"the table has no {quantity} of any module")
    return rows.assign(place=place(rows))


def place(table: pd.DataFrame) -> pd.Series:
    """Position of every row on the layer axis: embed, (encoder) 0.., (decoder) 0.., head.

    Returns
    -------
    Series
        Ordered categorical over the places that occur; the stack is named only where there are two.
    """
    columns = ["stack", "layer", "role"]
    spots = table[columns].astype({"stack": "str", "role": "str"}).drop_duplicates()
    keys = [(stack, _to_layer_number(layer), role) for stack, layer, role in spots.itertuples(index=False)]
    several = len({stack for stack, layer, _ in keys if layer is not None}) > 1
    labels = {key: _cell_label(*key, several=several) for key in sorted(keys, key=lambda key: position(*key))}
    rows = zip(table["stack"], table["layer"], table["role"], strict=True)
    names = [labels[stack, _to_layer_number(layer), role] for stack, layer, role in rows]
    return pd.Series(pd.Categorical(names, list(dict.fromkeys(labels.values())), ordered=True), table.index)


def pool(table: pd.DataFrame, by: Sequence[str] = LAYER) -> pd.DataFrame:
    """Sum up the modules of a cell by the rule of their quantity: root of summed squares, sum or mean.

    A row of a whole block stands for the block's modules wherever the cell holds the block as a whole, and steps back
    where ``by`` parts it by role: nothing is counted twice. A cell with an unknown value is unknown.

    Parameters
    ----------
    table : DataFrame
        From ``select``.
    by : sequence of str
        Columns that name a cell, besides run, step and quantity.

    Returns
    -------
    DataFrame
        ``run, step, quantity``, ``by`` and ``value``: one row a cell.
    """
    keys = [*_KEY, *by]
    table = _drop_duplicate_rows(table, by)
    parts = []
    for rule, rows in table.groupby(table["quantity"].map(lambda name: QUANTITIES[name].pool).astype("str")):
        values = rows.assign(value=rows["value"] ** 2) if rule == "norm" else rows
        cells = values.groupby(keys, observed=True, dropna=False, sort=False)["value"]
        pooled = cells.mean(skipna=False) if rule == "mean" else cells.sum(skipna=False)
        parts.append(np.sqrt(pooled) if rule == "norm" else pooled)
    return pd.concat(parts).reset_index()


def per_weight(table: pd.DataFrame, modules: pd.DataFrame, by: Sequence[str] = LAYER) -> pd.DataFrame:
    """Norms of cells over the root of the number of their weights, so that layers of different size compare.

    Parameters
    ----------
    table : DataFrame
        From ``select``, of a norm of the weight or of its update.
    modules : DataFrame
        ``names.describe`` of the model: its matrices alone have a known size, so cells hold them alone.
    by : sequence of str
        As for ``pool``.
    """
    sizes = modules.astype({"module": "str"}).drop_duplicates("module").set_index("module")
    weights = table["module"].astype("str").map(sizes["out_features"] * sizes["in_features"]).astype("float64")
    sums = table.assign(square=table["value"] ** 2, weights=weights)[weights.notna()]
    cells = sums.groupby([*_KEY, *by], observed=True, dropna=False, sort=False)[["square", "weights"]]
    pooled = cells.sum(min_count=1)
    return (pooled["square"] / pooled["weights"]).pow(0.5).rename("value").reset_index()


def last(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the last step at which a run recorded the quantity; without any known step, all its rows."""
    final = table.groupby(["run", "quantity"], observed=True)["step"].transform("max")
    return table[(table["step"] == final).fillna(False) | (table["step"].isna() & final.isna())]


def mean_over_steps(cells: pd.DataFrame) -> pd.DataFrame:
    """Mean of every cell over the recorded steps 1..T; the state before training does not count.

    With ``weight_norm`` by layer this is LISA's w(l) (section 3.1).
    """
    return _after_step_zero(cells).mean().reset_index()


def course(cells: pd.DataFrame) -> pd.DataFrame:
    """How every cell went over the recorded steps 1..T: ``mean, std, first, last, steps``; ``std`` about its mean."""
    found = _after_step_zero(cells.sort_values("step"))
    parts = {"mean": found.mean(), "std": found.std(ddof=0), "first": found.first(), "last": found.last()}
    return pd.DataFrame(parts | {"steps": found.size()}).reset_index()


def _after_step_zero(cells: pd.DataFrame) -> Any:
    """The values of every cell after step 0."""
    rows = cells[(cells["step"] > 0).fillna(False)]
    return rows.groupby(_cell_columns(cells), observed=True, dropna=False, sort=False)["value"]


def since_start(cells: pd.DataFrame) -> pd.DataFrame:
    """Value of every cell minus its value at step 0: what training added to what the initialisation put there.

    Raises
    ------
    ValueError
        A cell has no step 0.
    """
    key = _cell_columns(cells)
    start = cells.loc[(cells["step"] == 0).fillna(False), [*key, "value"]]
    both = cells.merge(start, on=key, how="left", suffixes=("", "_start"), indicator=True)
    if (both["_merge"] == "left_only").any():
        raise ValueError("a cell was not recorded at step 0, so its growth is unknown: record from the start")
    return cells.assign(value=both["value"].to_numpy() - both["value_start"].to_numpy())


def ratio_to_block_median(layers: pd.DataFrame) -> pd.DataFrame:
    """Every layer's value over the median of the blocks of the same run, step and quantity.

    Parameters
    ----------
    layers : DataFrame
        From ``pool`` by layer: rows with a ``layer`` are blocks.
    """
    key = [column for column in _KEY if column in layers.columns]
    blocks = layers["value"].where(layers["layer"].notna())
    median = blocks.groupby([layers[column] for column in key], observed=True, dropna=False).transform("median")
    return layers.assign(value=layers["value"] / median)


def frames(cells: pd.DataFrame, most: int) -> pd.DataFrame:
    """Rows at no more than ``most`` steps, evenly taken, first and last among them, of those that all runs recorded.

    Raises
    ------
    ValueError
        The runs have no step in common.
    """
    steps = [set(rows["step"].dropna()) for _, rows in cells.groupby("run", observed=True)]
    common = sorted(set.intersection(*steps))
    if not common:
        raise ValueError("the runs were recorded at no common step: train them with the same steps and every=")
    chosen = np.unique(np.linspace(0, len(common) - 1, min(most, len(common))).round().astype(int))
    return cells[cells["step"].isin([common[index] for index in chosen])]


def _drop_duplicate_rows(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Drop either the row of a whole block or those of its modules."""
    block = table["role"] == "block"
    if "module" in by:
        return table
    if "role" in by:
        return table[~block]
    same = [table[column] for column in [*_KEY, "stack", "layer"]]
    covered = block.groupby(same, observed=True, dropna=False).transform("any")
    return table[block | ~covered]


def _to_layer_number(layer: Any) -> int | None:
    return None if pd.isna(layer) else int(layer)


def _cell_label(stack: str, layer: int | None, role: str, *, several: bool) -> str:
    name = role if layer is None else str(layer)
    return f"{stack} {name}" if several and stack else name


def _cell_columns(cells: pd.DataFrame) -> list[str]:
    return [column for column in cells.columns if column not in ("step", "value")]
