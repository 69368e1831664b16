"""Spectral entries and coefficients of updates with a sparse Fourier spectrum.

Frequencies are counted from the middle of the spectrum: row j of a weight with d rows is frequency j if 2 j < d, else
j - d. An entry and its mirror (-j, -k) are the same cosine, so both have one coefficient, the sum of the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.initial_update import at_start
from lorascope.runs.result import Result
from lorascope.updates import Fourier, fourier
from lorascope.updates.linalg import as_float64

_RECORDED = {"coefficient_gradient": "gradient", "coefficient_importance": "importance"}


def fourier_updates(run: Result, step: int | None = None) -> Mapping[str, Any]:
    """Select the Fourier updates of a run for analysis, by module; empty if its first update is of another kind."""
    updates = run.updates(step)
    first = next(iter(updates.values()), None)
    if not isinstance(first, Fourier):
        return {}
    return updates


def basis_setting(run: Result) -> Mapping[str, str]:
    """Return the basis of a FourierFT run to analyze as ``{"basis": name}``; empty for other methods."""
    recipe = run.meta.recipe
    return {"basis": recipe["basis"]} if "basis" in recipe else {}


def learned_fourier_updates(run: Result) -> dict[str, Fourier]:
    """Return the learned Fourier updates ΔW - ΔW₀ by module; empty if the initial updates were not saved."""
    last = fourier_updates(run)
    if not last:
        return {}
    first = at_start(run.updates)
    return {module: update - first[module] for module, update in last.items() if module in first}


def corner_radius(shape: tuple[int, int]) -> float:
    """Compute the distance of the highest Fourier frequency from zero."""
    return math.hypot(shape[0] // 2, shape[1] // 2)


def list_coefficients(run: Result, step: int | None = None) -> pd.DataFrame:
    """Return everything a run recorded about its Fourier coefficients at a step with a snapshot, by default the last.

    Returns
    -------
    DataFrame
        One row per coefficient: ``module, index``; ``row, column`` (the entry, from 0), ``radius`` (its distance from
        frequency zero) and ``mirrored`` (whether its mirror is another entry, so both are one frequency);
        ``coefficient`` and its initial value ``start``; ``gradient`` and ``importance`` as ``observe.coefficients``
        recorded them at this step. Values that were not recorded are NaN.
    """
    updates = fourier_updates(run, step)
    first = at_start(run.updates)
    table = run.table
    if step is None:
        step = table["step"].max()
    rows = table[table["step"] == step]
    recorded = rows[rows["quantity"].isin(_RECORDED)].pivot(
        index=["module", "index"], columns="quantity", values="value"
    )
    tables = []
    for module, update in updates.items():
        start: Any = np.nan
        if module in first:
            start = as_float64(first[module].coefficients)
        row, column = update.entries
        entry, mirror = _add_mirrors(update)["entry"].to_numpy().reshape(2, -1)
        columns = {"module": module, "index": np.arange(len(row)), "row": row, "column": column}
        columns |= {"radius": fourier.radius(update.entries, update.shape)}
        # Frequency zero and the highest frequency of an even side are their own mirrors.
        columns |= {"mirrored": np.isin(mirror, entry) & (mirror != entry)}
        tables.append(pd.DataFrame(columns | {"coefficient": update.coefficients, "start": start}))
    coefficients = pd.concat(tables, ignore_index=True)
    index = pd.MultiIndex.from_frame(coefficients[["module", "index"]])
    # Without ``observe.coefficients`` both columns are missing.
    recorded = recorded.reindex(index=index, columns=list(_RECORDED))
    return coefficients.assign(**{name: recorded[quantity].to_numpy() for quantity, name in _RECORDED.items()})


def list_frequencies(update: Fourier) -> pd.DataFrame:
    """List every Fourier frequency at both of its positions in the spectrum: the entry and its mirror.

    Returns
    -------
    DataFrame
        ``row, column`` (frequencies, from -d/2), ``radius`` (their distance from zero), ``coefficient``.
    """
    frequencies = _add_mirrors(update).drop_duplicates(["row", "column"])
    return frequencies.drop(columns=["entry", "frequency"]).sort_values(["row", "column"], ignore_index=True)


def radial_profile(update: Fourier, bins: int = 16) -> pd.DataFrame:
    """Compute the root mean square of Fourier coefficients in rings of equal width, from frequency zero to the corner.

    Returns
    -------
    DataFrame
        ``radius`` (the middle of the ring) and ``value``, NaN for a ring without entries.
    """
    edges = np.linspace(0.0, corner_radius(update.shape), bins + 1)
    once = _add_mirrors(update).drop_duplicates("frequency")
    # The corner is on the last edge and would otherwise be in a separate ring.
    ring = np.minimum(np.searchsorted(edges, once["radius"], side="right") - 1, bins - 1)
    squares = (once["coefficient"] ** 2).groupby(ring).mean().reindex(range(bins))
    return pd.DataFrame({"radius": (edges[:-1] + edges[1:]) / 2, "value": np.sqrt(squares.to_numpy())})


def _add_mirrors(update: Fourier) -> pd.DataFrame:
    """Return the entries, then their mirrors: flat index, frequencies, and the sum of the coefficients of both."""
    sides = np.array(update.shape)[:, None]
    # The mirror of row j is row -j, which is d - j modulo the number of rows d.
    positions = np.hstack([update.entries, -update.entries % sides])
    entry = np.ravel_multi_index(tuple(positions), update.shape)
    # An entry and its mirror are one frequency, identified by the smaller of their flat indices.
    frequency = entry.reshape(2, -1).min(axis=0)
    summed = pd.Series(update.coefficients).groupby(frequency).transform("sum")
    row, column = np.where(2 * positions < sides, positions, positions - sides)
    columns = {"row": row, "column": column, "radius": fourier.radius(positions, update.shape), "entry": entry}
    return pd.DataFrame(columns | {"frequency": np.tile(frequency, 2), "coefficient": np.tile(summed, 2)})


def bias_by_distance(shape: tuple[int, int], center: float, width: float) -> pd.DataFrame:
    """Compute the Fourier frequency bias by distance from zero, out to the corner of a spectrum.

    Returns
    -------
    DataFrame
        ``distance`` and ``probability``: the selection probability of an entry relative to one at distance ``center``.
    """
    last = int(corner_radius(shape))
    # The first half of a one-row spectrum contains every distance once.
    values = fourier.band_pass((1, 2 * last), center, width)[0, : last + 1]
    return pd.DataFrame({"distance": np.arange(last + 1), "probability": values})


def bias_map(shape: tuple[int, int], center: float, width: float) -> pd.DataFrame:
    """Compute the Fourier frequency bias on a grid of about 48 rows and columns that contains frequency zero.

    Returns
    -------
    DataFrame
        ``row, column`` (frequencies) and ``probability``, relative to an entry at distance ``center``.
    """
    values = fourier.band_pass(shape, center, width)
    grid = []
    for side in shape:
        step = -(-side // 48)  # rounded up; multiples of the step include frequency zero
        grid.append(step * np.arange(-(side // 2 // step), side // 2 // step + 1))
    rows, columns = np.stack(np.meshgrid(*grid, indexing="ij")).reshape(2, -1)
    return pd.DataFrame({"row": rows, "column": columns, "probability": values[rows % shape[0], columns % shape[1]]})
