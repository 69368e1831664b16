"""Numbers of an adapter next to their null: random factors, and modules of the same role.

The effective and the stable rank of an update ``B A`` depend on its shape, even if training left no pattern in it. The
null is ``B A`` with independent normal entries, whose ranks are the same at any norm. ``R_B R_A^T`` has the same
singular values; its triangular factors are drawn directly (Bartlett, 1933), so the size of the module does not matter.
A p-value is the fraction of draws with a rank as low, counting the adapter itself.

A norm has no such null: most untrained adapters have norm 0; see ``untrained`` for the others. It is compared with the
same role in the other layers, along a line through the depth (Theil, 1950; Sen, 1968).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.diagnosis.inspection import Inspection
from lorascope.diagnosis.untrained import untrained_norms
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.updates import effective_rank, stable_rank

DRAWS = 999
LEVEL = 0.05
"""Expected fraction of false findings among the modules below the null, after Benjamini and Hochberg."""
OUTLIER = 3.5
"""Robust z of an outlier (Iglewicz and Hoaglin, 1993)."""
_FEWEST = 5  # modules of a role, for a line and a spread
_NORMAL = 1.4826  # standard deviation of normal values relative to their median absolute deviation
_RANKS: dict[str, Callable[[Any], float]] = {"effective_rank": effective_rank, "stable_rank": stable_rank}


def null_table(inspection: Inspection, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Compare the ranks of every module with random factors, and its norm with its role in the other layers.

    Parameters
    ----------
    inspection : Inspection
        Result of ``inspect``.
    draws : int
        Number of random updates per shape. Default 999.
    seed : int
        Seed of the draws. Default 0.

    Returns
    -------
    DataFrame
        One row per module: ``module, role, layer``; for effective and stable rank ``*_null`` (mean of the draws) and
        ``*_p``, NaN unless the update is a product of two factors of rank >= 2; ``norm_z``, the robust z of the
        logarithm of the norm, NaN for roles with fewer than five modules; and ``untrained_norm``, the root mean square
        of |dW| before training, NaN if it is not known.
    """
    modules = inspection.modules
    updates, rng = inspection.run.updates(), np.random.default_rng(seed)
    null: dict[tuple[tuple[int, int], int], dict[str, Float[np.ndarray, "draws"]]] = {}
    rows = []
    for row in modules.to_dict("records"):
        values = dict.fromkeys([f"{name}_{kind}" for name in _RANKS for kind in ("null", "p")], np.nan)
        update = updates.get(row["module"])
        product = None if update is None else update.low_rank
        if product is not None and product.rank >= 2 and np.isfinite(row["effective_rank"]) and row["update_norm"] > 0:
            key = product.shape, product.rank
            if key not in null:
                spectra = random_spectra(*key, draws, rng)
                null[key] = {name: np.array([rank(sigma) for sigma in spectra]) for name, rank in _RANKS.items()}
            for name, drawn in null[key].items():
                values[f"{name}_null"] = float(drawn.mean())
                values[f"{name}_p"] = (1 + int((drawn <= row[name]).sum())) / (draws + 1)
        rows.append({name: row[name] for name in ("module", "role", "layer")} | values)
    norms = untrained_norms(inspection.run, dict(zip(modules["module"], modules["update_norm"], strict=True)))
    return pd.DataFrame(rows).assign(norm_z=_norm_z(modules), untrained_norm=list(norms.values()))


def random_spectra(
    shape: tuple[int, int], rank: int, draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draws k"]:
    """Draw the singular values of ``B A`` with independent normal B (out, rank) and A (rank, in)."""
    left, right = (_triangle(size, rank, draws, rng) for size in shape)
    return np.linalg.svd(left @ right.swapaxes(1, 2), compute_uv=False)


def _triangle(size: int, rank: int, draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draws k rank"]:
    """Draw R of the QR decomposition of normal matrices (size, rank), with positive diagonals."""
    height = min(size, rank)
    R = np.triu(rng.standard_normal((draws, height, rank)), 1)
    freedom = size - np.arange(height)
    R[:, np.arange(height), np.arange(height)] = np.sqrt(rng.chisquare(freedom, (draws, height)))
    return R


def _norm_z(modules: pd.DataFrame) -> pd.Series:
    """Return the robust z of log norms within each stack and role, relative to a line through the layers."""
    z = pd.Series(np.nan, index=modules.index)
    with np.errstate(divide="ignore"):
        logs = np.log10(modules["update_norm"].to_numpy(np.float64))
    usable = np.isfinite(logs) & modules["layer"].notna().to_numpy()
    for _, cell in modules[usable].groupby(["stack", "role"], observed=True):
        if len(cell) < _FEWEST:
            continue
        y = logs[modules.index.get_indexer(cell.index)]
        x = cell["layer"].to_numpy(np.float64)
        apart = x[:, None] < x[None]
        slopes = ((y[None] - y[:, None])[apart]) / ((x[None] - x[:, None])[apart])
        rest = y - (np.median(slopes) if len(slopes) else 0.0) * x
        rest -= np.median(rest)
        spread = _NORMAL * np.median(np.abs(rest))
        if spread > 0:
            z[cell.index] = rest / spread
    return z


def below_null(table: pd.DataFrame, name: str) -> pd.Series:
    """Return the modules whose rank is below the null, at a false discovery rate of ``LEVEL``."""
    p = table[f"{name}_p"].dropna().sort_values()
    passed = p.to_numpy() <= LEVEL * np.arange(1, len(p) + 1) / max(len(p), 1)
    count = int(np.flatnonzero(passed)[-1]) + 1 if passed.any() else 0
    return table.index.to_series().isin(p.index[:count])


def outliers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the modules whose norm is an outlier, the largest first."""
    far = table[table["norm_z"].abs() > OUTLIER]
    return far.reindex(far["norm_z"].abs().sort_values(ascending=False).index)
