"""Two adapters side by side, of any ranks and methods: how large, how alike in direction, how differently allotted.

Nothing here depends on how an update was split into factors, and no product of factors is formed. As one vector of all
weights, an adapter is zero in the modules that it leaves alone. A head that trained in full beside it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.leading_directions import Directions, chance_angle, leading_singular_vectors, mean_angle
from lorascope.runs.run import Run
from lorascope.updates.linalg import as_float64, one_thread
from lorascope.updates.low_rank import Dense, LowRank

DIRECTIONS = 8
"""Leading directions of each update that are compared."""
SIDE = 1024
"""Smaller side up to which dense updates are decomposed without being asked to."""
_MODULES = ("one", "other", "module", "norm_ratio", "cosine", "angle", "chance", "inner")


def inner(one: LowRank | Dense, other: LowRank | Dense) -> float:
    """<dW_1, dW_2>, the sum of their products weight by weight; of factors from their small Gram matrices."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        left, right = as_float64(one.B).T @ as_float64(other.B), as_float64(one.A) @ as_float64(other.A).T
        return float(one.scale * other.scale * np.vdot(left, right))
    if isinstance(other, LowRank):
        return inner(other, one)
    if isinstance(one, LowRank):
        return float(one.scale * np.vdot(as_float64(one.B).T @ other.dense(), as_float64(one.A)))
    return float(np.vdot(one.dense(), other.dense()))


def modules(runs: Mapping[str, Run], spectra: bool = False) -> pd.DataFrame:
    """Every two runs in every module that both have an update of.

    Parameters
    ----------
    runs : mapping label -> Run
        Runs or adapters on one model.
    spectra : bool
        Decompose dense updates of any size for their directions.

    Returns
    -------
    DataFrame
        ``one, other, module, norm_ratio, cosine, angle`` (mean principal angle in degrees of the leading 8 directions
        of outputs and inputs), ``chance`` (that of as many random ones), ``inner``. NaN is what cannot be known: an
        update is zero or not finite, was not kept, or is dense and too large.

    Raises
    ------
    ValueError
        A module has other shapes in two runs: they are not on one model.
    """
    updates = {label: run.updates() for label, run in runs.items()}
    tables = {label: _summary_table(run) for label, run in runs.items()}
    rows = []
    with one_thread():
        for module in dict.fromkeys(name for table in tables.values() for name in table.index):
            holding = [label for label, table in tables.items() if module in table.index]
            if len(holding) > 1:
                held = {label: updates[label][module] for label in holding if module in updates[label]}
                _check_shapes(module, held)
                sizes = {label: float(tables[label].loc[module, "update_norm"]) for label in holding}
                rows += [{"module": module} | row for row in _compare_pairs(held, sizes, spectra)]
    return pd.DataFrame(rows, columns=list(_MODULES))


def matrix(runs: Mapping[str, Run], shared: pd.DataFrame) -> pd.DataFrame:
    """Every run with every other and with itself, over all modules together.

    Parameters
    ----------
    runs : mapping label -> Run
    shared : DataFrame
        ``modules(runs)``.

    Returns
    -------
    DataFrame
        ``one, other, norm_ratio`` (|dW| of one over that of the other), ``cosine`` (between the whole updates),
        ``angle, chance`` (means over modules, in degrees), ``rank_moved`` (share of the ranks that would have to move
        to other modules to go from one to the other: 0 for the same allocation, 1 where no module is in both),
        ``energy_moved`` (the same of |dW|^2) and ``shared`` (number of modules that both have).
    """
    tables = {label: _summary_table(run) for label, run in runs.items()}
    norms = {label: float(np.sqrt((table["update_norm"] ** 2).sum())) for label, table in tables.items()}
    rows = []
    for one in runs:
        for other in runs:
            same = shared[((shared["one"] == one) & (shared["other"] == other)) | _is_reversed(shared, one, other)]
            told = {"one": one, "other": other, "norm_ratio": _ratio(norms[one], norms[other])}
            told |= {"rank_moved": _moved_fraction(tables[one]["rank"], tables[other]["rank"])}
            told |= {
                "energy_moved": _moved_fraction(tables[one]["update_norm"] ** 2, tables[other]["update_norm"] ** 2)
            }
            if one == other:
                told |= {"cosine": 1.0 if norms[one] else np.nan, "angle": 0.0, "shared": len(tables[one])}
            else:
                total = same["inner"].sum(skipna=False) if len(same) else 0.0
                told |= {"cosine": _ratio(total, norms[one] * norms[other]), "shared": len(same)}
                told |= {"angle": same["angle"].mean(), "chance": same["chance"].mean()}
            rows.append(told)
    names = ("norm_ratio", "cosine", "angle", "chance", "rank_moved", "energy_moved", "shared")
    return pd.DataFrame(rows, columns=["one", "other", *names])


def _summary_table(run: Run) -> pd.DataFrame:
    """The summary by module, without what trained beside the adapters, such as a head, if there are adapters."""
    table, held = run.summary().set_index("module"), run.updates()
    return table[table.index.isin(list(held))] if len(held) else table


def _compare_pairs(
    updates: Mapping[str, LowRank | Dense], sizes: Mapping[str, float], spectra: bool
) -> list[dict[str, Any]]:
    """A row for each two runs that have the module."""
    sound = {label: update for label, update in updates.items() if np.isfinite(sizes[label]) and sizes[label] > 0}
    directions = {
        label: leading_singular_vectors(update, DIRECTIONS)
        for label, update in sound.items()
        if spectra or isinstance(update, LowRank) or min(update.shape) <= SIDE
    }
    rows = []
    for one, other in combinations(sizes, 2):
        both = one in updates and other in updates
        # What is not finite counts as nothing in the sums over modules, as it does in the norms.
        finite = np.isfinite(sizes[one]) and np.isfinite(sizes[other])
        product = (inner(updates[one], updates[other]) if finite else 0.0) if both else np.nan
        angle, chance = _angle(directions.get(one), directions.get(other))
        told = {"one": one, "other": other, "norm_ratio": _ratio(sizes[one], sizes[other])}
        told |= {"cosine": _ratio(product, sizes[one] * sizes[other]), "angle": angle, "chance": chance}
        rows.append(told | {"inner": product})
    return rows


def _angle(one: Directions | None, other: Directions | None) -> tuple[float, float]:
    """Mean principal angle, and that by chance."""
    if one is None or other is None:
        return np.nan, np.nan
    k = min(one.left.shape[1], other.left.shape[1])
    return mean_angle(one, other), float(np.mean([chance_angle(len(side), k, k) for side in one]))


def _check_shapes(module: str, updates: Mapping[str, LowRank | Dense]) -> None:
    shapes = {label: update.shape for label, update in updates.items()}
    for one, other in combinations(shapes, 2):
        if shapes[one] != shapes[other]:
            raise ValueError(
                f"{module} is {shapes[one]} in {one} and {shapes[other]} in {other}: they are not on one model"
            )


def _ratio(value: float, other: float) -> float:
    return float(value / other) if other else np.nan


def _moved_fraction(one: pd.Series, other: pd.Series) -> float:
    """Half the summed difference of two sets of shares, by module; NaN where one of them is unknown or zero."""
    if one.isna().any() or other.isna().any() or not one.sum() or not other.sum():
        return np.nan
    first, second = (values.astype("float64") / float(values.sum()) for values in (one, other))
    return float(first.sub(second, fill_value=0.0).abs().sum() / 2)


def _is_reversed(shared: pd.DataFrame, one: str, other: str) -> pd.Series:
    return (shared["one"] == other) & (shared["other"] == one)
