"""Where in the spectrum an update of few frequencies lies.

Frequencies are counted from the middle of the spectrum: row j of a weight with d rows stands for j where 2 j < d, else
for j - d. An entry and its mirror (-j, -k) are the same cosine, so that both have one coefficient, the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lorascope import fourier
from lorascope.fourier import Fourier
from lorascope.run import Run


def updates(run: Run, step: int | None = None) -> Mapping[str, Any]:
    """The updates of few frequencies that a run holds, by module; one of them tells for all."""
    found = run.updates(step)
    first = next(iter(found.values()), None)
    return found if isinstance(first, Fourier) else {}


def basis(run: Run) -> Mapping[str, str]:
    """The basis on which a run of FourierFT trains its coefficients, as ``{"basis": name}``; empty of other methods."""
    recipe = run.meta["recipe"]
    return {"basis": recipe.get("basis", "fourier")} if recipe.get("name") == "fourierft" else {}


def since_start(run: Run) -> dict[str, Fourier]:
    """What training added to the updates of few frequencies, by module; nothing where the start was not kept."""
    last = updates(run)
    try:
        first = run.updates(0) if last else {}
    except ValueError:  # no snapshot of step 0
        return {}
    return {module: update - first[module] for module, update in last.items() if module in first}


def corner(shape: tuple[int, int]) -> float:
    """Distance of the highest frequency from zero."""
    return math.hypot(shape[0] // 2, shape[1] // 2)


def places(update: Fourier) -> pd.DataFrame:
    """Every frequency at both of its places.

    Returns
    -------
    DataFrame
        ``row, column`` (frequencies, from -d/2), ``radius`` (their distance from zero), ``coefficient``.
    """
    both = _both(update).drop_duplicates(["row", "column"])
    return both.drop(columns="frequency").sort_values(["row", "column"], ignore_index=True)


def profile(update: Fourier, bins: int = 16) -> pd.DataFrame:
    """Root mean square of the coefficients in rings of equal width, from frequency zero to the corner.

    Returns
    -------
    DataFrame
        ``radius`` (the middle of the ring) and ``value``, NaN where a ring holds no entry.
    """
    edges = np.linspace(0.0, corner(update.shape), bins + 1)
    once = _both(update).drop_duplicates("frequency")
    ring = np.minimum(np.searchsorted(edges, once["radius"], side="right") - 1, bins - 1)
    squares = (once["coefficient"] ** 2).groupby(ring).mean().reindex(range(bins))
    return pd.DataFrame({"radius": (edges[:-1] + edges[1:]) / 2, "value": np.sqrt(squares.to_numpy())})


def _both(update: Fourier) -> pd.DataFrame:
    """Entries, then their mirrors, with the number of the frequency and the sum of its coefficients."""
    sides = np.array(update.shape)[:, None]
    mirrored = -update.entries % sides
    numbers = np.minimum(*(place[0] * sides[1] + place[1] for place in (update.entries, mirrored)))
    summed = pd.Series(update.coefficients).groupby(numbers).transform("sum")
    parts = []
    for place in (update.entries, mirrored):
        row, column = np.where(2 * place < sides, place, place - sides)
        told = {"row": row, "column": column, "radius": fourier.radius(place, update.shape)}
        parts.append(pd.DataFrame(told | {"frequency": numbers, "coefficient": summed}))
    return pd.concat(parts, ignore_index=True)


def bias(shape: tuple[int, int], center: float | int, width: float | int) -> pd.DataFrame:
    """The frequency bias by distance from zero, out to the corner of a spectrum.

    Returns
    -------
    DataFrame
        ``distance`` and ``probability``, that of a draw against the most likely place.
    """
    last = int(corner(shape))
    # A spectrum of a single row runs through all distances.
    values = fourier.band_pass((1, 2 * last), center, width)[0, : last + 1]
    return pd.DataFrame({"distance": np.arange(last + 1), "probability": values})


def bias_map(shape: tuple[int, int], center: float | int, width: float | int, cells: int = 48) -> pd.DataFrame:
    """The frequency bias on a grid of about so many rows and columns, zero among them.

    Returns
    -------
    DataFrame
        ``row, column`` (frequencies) and ``probability``.
    """
    values = fourier.band_pass(shape, center, width)
    grid = []
    for side in shape:
        step = -(-side // cells)
        grid.append(step * np.arange(-(side // 2 // step), side // 2 // step + 1))
    rows, columns = (part.reshape(-1) for part in np.meshgrid(*grid, indexing="ij"))
    return pd.DataFrame({"row": rows, "column": columns, "probability": values[rows % shape[0], columns % shape[1]]})
