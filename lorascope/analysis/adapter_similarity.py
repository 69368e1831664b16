"""Pairwise comparison of adapters of any rank and method: size, direction, and allocation of rank and energy.

No result depends on how an update is split into factors, and the product of the factors is never formed. Seen as one
vector of all weights, an adapter is zero in the modules it does not change. Modules saved as full weights are excluded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations, product

import numpy as np
import pandas as pd

from lorascope.analysis.leading_directions import angle_and_chance, leading_singular_vectors
from lorascope.runs.result import Result
from lorascope.updates.linalg import one_thread

DIRECTIONS = 8  # leading singular vectors of each update that are compared
SIDE = 1024  # largest smaller side of a dense update that is decomposed by default


def compare_modules(runs: Mapping[str, Result], spectra: bool = False) -> pd.DataFrame:
    """Compute the similarity of every pair of adapters or runs in every module that both update.

    Parameters
    ----------
    runs : mapping label -> Run
        Runs or adapters of the same model.
    spectra : bool
        Whether to decompose dense updates of any size for their directions; by default up to a smaller side of 1024.

    Returns
    -------
    DataFrame
        ``one, other, module, norm_ratio`` (norm of ``one`` over norm of ``other``), ``cosine``, ``angle``, ``chance``
        and ``inner`` (the inner product of the updates). ``angle`` is the mean principal angle in degrees between the
        leading 8 singular vectors, over outputs and inputs; ``chance`` is its mean for random subspaces.

        ``cosine``, ``angle`` and ``chance`` are NaN if an update is zero, not finite or was not saved; the angles also
        if it is dense and too large. ``norm_ratio`` is NaN if ``other`` is zero or a norm is not finite. ``inner`` is
        NaN if an update was not saved, and 0 if it is not finite. A DoRA run saves only a part of its updates.

    Raises
    ------
    ValueError
        A module has different shapes in two runs, so they are not of the same model.
    """
    updates = {label: run.updates() for label, run in runs.items()}
    incomplete = {label: run.incomplete_updates() for label, run in runs.items()}
    sizes_of_modules: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for label, run in runs.items():
        for module, norm in _summary_table(run)["update_norm"].items():
            sizes_of_modules[str(module)][label] = float(norm)
    rows = []
    with one_thread():
        for module, sizes in sizes_of_modules.items():
            if len(sizes) < 2:
                continue
            shared_updates, directions = {}, {}
            for label, size in sizes.items():
                if module not in updates[label] or module in incomplete[label]:
                    continue
                update = shared_updates[label] = updates[label][module]
                # Decomposing a large dense update is slow, so the caller has to request it.
                is_fast = update.low_rank is not None or min(update.shape) <= SIDE
                if 0 < size < np.inf and (spectra or is_fast):
                    directions[label] = leading_singular_vectors(update, DIRECTIONS)
            for label, other in combinations(sizes, 2):
                dot, angle, chance = np.nan, np.nan, np.nan
                if label in shared_updates and other in shared_updates:
                    shape, other_shape = shared_updates[label].shape, shared_updates[other].shape
                    if shape != other_shape:
                        raise ValueError(
                            f"cannot compare {label} and {other}: {module} is {shape} in {label} and {other_shape} in "
                            f"{other}. Compare adapters of one model"
                        )
                    # Updates that are not finite are excluded from the sums over modules, as they are from the norms.
                    dot = 0.0
                    if np.isfinite(sizes[label]) and np.isfinite(sizes[other]):
                        dot = shared_updates[label].inner(shared_updates[other])
                if label in directions and other in directions:
                    angle, chance = angle_and_chance(directions[label], directions[other])
                cosine = _ratio(dot, sizes[label] * sizes[other])
                rows.append((label, other, module, _ratio(sizes[label], sizes[other]), cosine, angle, chance, dot))
    return pd.DataFrame(rows, columns=["one", "other", "module", "norm_ratio", "cosine", "angle", "chance", "inner"])


def compare_adapters(runs: Mapping[str, Result], shared: pd.DataFrame) -> pd.DataFrame:
    """Compute the similarity of every pair of adapters or runs over all modules at once, each with itself included.

    Parameters
    ----------
    runs : mapping label -> Run
        See ``compare_modules``.
    shared : DataFrame
        The result of ``compare_modules(runs)``.

    Returns
    -------
    DataFrame
        ``one, other``; ``norm_ratio``, ``|dW|`` of ``one`` over that of ``other``; ``cosine`` between the whole
        updates; ``angle, chance``, means over shared modules in degrees; ``rank_moved``, the fraction of rank in
        different modules (0 for the same allocation, 1 without a common module); ``energy_moved``, the same for
        ``|dW|^2``; ``shared``, the number of modules that both update.
    """
    tables, norms = {}, {}
    for label, run in runs.items():
        tables[label] = _summary_table(run)
        norms[label] = float(np.sqrt((tables[label]["update_norm"] ** 2).sum()))
    by_pair = {frozenset(pair): rows for pair, rows in shared.groupby(["one", "other"])}
    rows = []
    for label, other in product(runs, repeat=2):  # in both orders, because the ratio of norms is not symmetric
        first, second = tables[label], tables[other]
        entry = {
            "one": label,
            "other": other,
            "norm_ratio": _ratio(norms[label], norms[other]),
            "rank_moved": _moved_fraction(first["rank"], second["rank"]),
            "energy_moved": _moved_fraction(first["update_norm"] ** 2, second["update_norm"] ** 2),
        }
        if label == other:
            entry |= {"cosine": 1.0 if norms[label] else np.nan, "angle": 0.0, "shared": len(first)}
        else:
            same = by_pair.get(frozenset((label, other)), shared[:0])
            # Without a common module the inner product is an empty sum; if one update was not saved it is unknown.
            total = same["inner"].sum(skipna=False)
            entry |= {"cosine": _ratio(total, norms[label] * norms[other]), "shared": len(same)}
            entry |= {"angle": same["angle"].mean(), "chance": same["chance"].mean()}
        rows.append(entry)
    measures = ["norm_ratio", "cosine", "angle", "chance", "rank_moved", "energy_moved", "shared"]
    return pd.DataFrame(rows, columns=["one", "other", *measures])


def _summary_table(run: Result) -> pd.DataFrame:
    """Return the summary by module; if the run has updates, without modules saved as full weights, such as a head."""
    table, updates = run.summary().set_index("module"), run.updates()
    if not len(updates):
        return table
    return table[table.index.isin(list(updates))]


def _ratio(value: float, other: float) -> float:
    return float(value / other) if other else np.nan


def _moved_fraction(left: pd.Series, right: pd.Series) -> float:
    """Return half the summed difference of two sets of fractions by module; NaN if one is unknown or sums to zero."""
    if left.isna().any() or right.isna().any() or not left.sum() or not right.sum():
        return np.nan
    first, second = (values.astype("float64") / float(values.sum()) for values in (left, right))
    # A module that only one run adapts has fraction 0 in the other.
    return float(first.sub(second, fill_value=0.0).abs().sum() / 2)
