"""Pairwise comparison of adapters of any rank and method: size, direction, and allocation of rank and energy.

No result depends on how an update is split into factors, and the product of the factors is never formed. Seen as one
vector of all weights, an adapter is zero in the modules it does not change. Modules saved as full weights, such as a
classifier head, are excluded.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.leading_directions import Directions, chance_angle, leading_singular_vectors, mean_angle
from lorascope.runs.result import Result
from lorascope.updates import Update
from lorascope.updates.linalg import one_thread

DIRECTIONS = 8
"""Number of leading singular vectors of each update that are compared."""
SIDE = 1024
"""Largest smaller side of a dense update that is decomposed by default."""
_MODULES = ("one", "other", "module", "norm_ratio", "cosine", "angle", "chance", "inner")


def modules(runs: Mapping[str, Result], spectra: bool = False) -> pd.DataFrame:
    """Compare every pair of runs in every module that both update.

    Parameters
    ----------
    runs : mapping label -> Run
        Runs or adapters of the same model.
    spectra : bool
        Whether to decompose dense updates of any size for their directions. By default only those whose smaller side
        is at most 1024.

    Returns
    -------
    DataFrame
        ``one, other, module, norm_ratio`` (norm of ``one`` over norm of ``other``), ``cosine``, ``angle``, ``chance``
        and ``inner`` (the inner product of the updates). ``angle`` is the mean principal angle in degrees between the
        leading 8 singular vectors, over outputs and inputs; ``chance`` is its mean for random subspaces.

        ``cosine``, ``angle`` and ``chance`` are NaN if an update is zero, not finite or was not saved; the angles also
        if it is dense and too large. ``norm_ratio`` is NaN if ``other`` is zero or a norm is not finite. ``inner`` is
        NaN if an update was not saved, and 0 if it is not finite.

    Raises
    ------
    ValueError
        A module has different shapes in two runs, so they are not of the same model.
    """
    updates = {label: run.updates() for label, run in runs.items()}
    tables = {label: _summary_table(run) for label, run in runs.items()}
    rows = []
    with one_thread():
        for module in dict.fromkeys(name for table in tables.values() for name in table.index):
            holding = [label for label, table in tables.items() if module in table.index]
            if len(holding) > 1:
                found = {label: updates[label][module] for label in holding if module in updates[label]}
                _check_shapes(module, found)
                sizes = {label: float(tables[label].loc[module, "update_norm"]) for label in holding}
                rows += [{"module": module} | row for row in _compare_pairs(found, sizes, spectra)]
    return pd.DataFrame(rows, columns=list(_MODULES))


def matrix(runs: Mapping[str, Result], shared: pd.DataFrame) -> pd.DataFrame:
    """Compare every run with every run, itself included, over all modules at once.

    Parameters
    ----------
    runs : mapping label -> Run
        Runs or adapters of the same model.
    shared : DataFrame
        The result of ``modules(runs)``.

    Returns
    -------
    DataFrame
        ``one, other``; ``norm_ratio``, ``|dW|`` of ``one`` over that of ``other``; ``cosine`` between the whole
        updates; ``angle, chance``, means over shared modules in degrees; ``rank_moved``, the fraction of rank in
        different modules (0 for the same allocation, 1 without a common module); ``energy_moved``, the same for
        ``|dW|^2``; ``shared``, the number of modules that both update.
    """
    tables = {label: _summary_table(run) for label, run in runs.items()}
    norms = {label: float(np.sqrt((table["update_norm"] ** 2).sum())) for label, table in tables.items()}
    rows = []
    for one in runs:
        for other in runs:
            same = shared[((shared["one"] == one) & (shared["other"] == other)) | _is_reversed(shared, one, other)]
            entry = {"one": one, "other": other, "norm_ratio": _ratio(norms[one], norms[other])}
            entry |= {"rank_moved": _moved_fraction(tables[one]["rank"], tables[other]["rank"])}
            entry |= {
                "energy_moved": _moved_fraction(tables[one]["update_norm"] ** 2, tables[other]["update_norm"] ** 2)
            }
            if one == other:
                entry |= {"cosine": 1.0 if norms[one] else np.nan, "angle": 0.0, "shared": len(tables[one])}
            else:
                # Without a common module the inner product is 0; if one update was not saved it is unknown.
                total = same["inner"].sum(skipna=False) if len(same) else 0.0
                entry |= {"cosine": _ratio(total, norms[one] * norms[other]), "shared": len(same)}
                entry |= {"angle": same["angle"].mean(), "chance": same["chance"].mean()}
            rows.append(entry)
    names = ("norm_ratio", "cosine", "angle", "chance", "rank_moved", "energy_moved", "shared")
    return pd.DataFrame(rows, columns=["one", "other", *names])


def _summary_table(run: Result) -> pd.DataFrame:
    """Return the summary by module; if the run has updates, without modules saved as full weights, such as a head."""
    table, updates = run.summary().set_index("module"), run.updates()
    return table[table.index.isin(list(updates))] if len(updates) else table


def _compare_pairs(updates: Mapping[str, Update], sizes: Mapping[str, float], spectra: bool) -> list[dict[str, Any]]:
    """Return a row for each pair of runs that update the module."""
    sound = {label: update for label, update in updates.items() if np.isfinite(sizes[label]) and sizes[label] > 0}
    # Decomposing a large dense update is slow, so the caller has to request it.
    directions = {
        label: leading_singular_vectors(update, DIRECTIONS)
        for label, update in sound.items()
        if spectra or update.thin is not None or min(update.shape) <= SIDE
    }
    rows = []
    for one, other in combinations(sizes, 2):
        both = one in updates and other in updates
        # Updates that are not finite are excluded from the sums over modules, as they are from the norms.
        finite = np.isfinite(sizes[one]) and np.isfinite(sizes[other])
        product = (updates[one].inner(updates[other]) if finite else 0.0) if both else np.nan
        angle, chance = _angle(directions.get(one), directions.get(other))
        entry = {"one": one, "other": other, "norm_ratio": _ratio(sizes[one], sizes[other])}
        entry |= {"cosine": _ratio(product, sizes[one] * sizes[other]), "angle": angle, "chance": chance}
        rows.append(entry | {"inner": product})
    return rows


def _angle(one: Directions | None, other: Directions | None) -> tuple[float, float]:
    """Return the mean principal angle and its random baseline, in degrees."""
    if one is None or other is None:
        return np.nan, np.nan
    k = min(one.left.shape[1], other.left.shape[1])  # the baseline has to use as many directions as mean_angle
    return mean_angle(one, other), float(np.mean([chance_angle(len(side), k, k) for side in one]))


def _check_shapes(module: str, updates: Mapping[str, Update]) -> None:
    shapes = {label: update.shape for label, update in updates.items()}
    for one, other in combinations(shapes, 2):
        if shapes[one] != shapes[other]:
            raise ValueError(
                f"cannot compare {one} and {other}: {module} is {shapes[one]} in {one} and {shapes[other]} in {other}. "
                "Compare adapters of one model"
            )


def _ratio(value: float, other: float) -> float:
    return float(value / other) if other else np.nan


def _moved_fraction(one: pd.Series, other: pd.Series) -> float:
    """Return half the summed difference of two sets of fractions by module; NaN if one is unknown or sums to zero."""
    if one.isna().any() or other.isna().any() or not one.sum() or not other.sum():
        return np.nan
    first, second = (values.astype("float64") / float(values.sum()) for values in (one, other))
    # A module that only one run adapts has fraction 0 in the other.
    return float(first.sub(second, fill_value=0.0).abs().sum() / 2)


def _is_reversed(shared: pd.DataFrame, one: str, other: str) -> pd.Series:
    return (shared["one"] == other) & (shared["other"] == one)
