"""Numbers of an adapter next to their null: random factors, and modules of the same role.

The effective and the stable rank of an update ``B A`` depend on its shape, even if training left no pattern in it. The
null is ``B A`` with independent normal entries, whose ranks are the same at any norm, see `rank_use.random_spectra`.
A p-value is the fraction of draws with a rank as low, counting the adapter itself.

A norm has no such null: most untrained adapters have norm 0. It is compared with the same role in the other layers,
along a line through the depth (Theil, 1950; Sen, 1968), and with the norm before training, as far as that follows from
the files. Only FourierFT, C3A and WaveFT (with ``init_weights: false``) may start from independent random
coefficients; |dW| is a weighted norm of them. Its root mean square before training is sqrt(n) sigma |dW| / |c|, with
n coefficients c and the standard deviation sigma at the start. This is exact if all coefficients have the same weight,
as in C3A; entries of FourierFT that are their own mirror image weigh more. VB-LoRA and Uni-LoRA start from random
vectors that modules share, and PiSSA, OLoRA and similar initializations of LoRA from factors of the base weights. The
updates of these starts are not in the files.

Source: PEFT 0.21.2, for the initializations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lorascope.analysis.initial_update import at_start
from lorascope.analysis.rank_use import random_spectra
from lorascope.array_types import Float
from lorascope.diagnosis.inspection import Inspection
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.formats.peft_config import RESIDUAL_INITS
from lorascope.formats.peft_merge import MERGED
from lorascope.formats.stored_update import StoredUpdate
from lorascope.runs.adapter import Adapter
from lorascope.runs.result import Result
from lorascope.updates import effective_rank, stable_rank
from lorascope.updates.linalg import as_float64

DRAWS = 999
LEVEL = 0.05
"""Expected fraction of false findings among the modules below the null, after Benjamini and Hochberg."""
OUTLIER = 3.5
"""Robust z of an outlier (Iglewicz and Hoaglin, 1993)."""
_FEWEST = 5  # modules of a role, for a line and a spread
_NORMAL = 1.4826  # standard deviation of normal values relative to their median absolute deviation
_RANKS: dict[str, Callable[[Any], float]] = {"effective_rank": effective_rank, "stable_rank": stable_rank}
_NONZERO_STARTS = {"VB-LoRA", "Uni-LoRA", "KaSA", *MERGED}
"""Kinds whose start is random or depends on the base."""


def null_table(inspection: Inspection, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Compare the ranks of every module with their null (random factors), and its norm with its role in other layers.

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
    incomplete = inspection.run.incomplete_updates()
    draws_of_shape: dict[tuple[tuple[int, int], int], dict[str, Float[np.ndarray, "draws"]]] = {}
    rows = []
    for row in modules.to_dict("records"):
        values = dict.fromkeys(("effective_rank_null", "effective_rank_p", "stable_rank_null", "stable_rank_p"), np.nan)
        update = updates.get(row["module"])
        product = update and update.low_rank
        if row["module"] in incomplete:  # the ranks are of another matrix than the product
            product = None
        # A single component always has effective rank 1.
        if product is not None and product.rank >= 2 and np.isfinite(row["effective_rank"]) and row["update_norm"] > 0:
            key = product.shape, product.rank
            if key not in draws_of_shape:
                draws_of_shape[key] = _random_ranks(*key, draws, rng)
            for name, ranks in draws_of_shape[key].items():
                values[f"{name}_null"] = float(ranks.mean())
                values[f"{name}_p"] = (1 + int((ranks <= row[name]).sum())) / (draws + 1)
        rows.append({"module": row["module"], "role": row["role"], "layer": row["layer"]} | values)
    norms = _untrained_norms(inspection.run, dict(zip(modules["module"], modules["update_norm"], strict=True)))
    return pd.DataFrame(rows).assign(norm_z=_norm_z(modules), untrained_norm=list(norms.values()))


def _random_ranks(
    shape: tuple[int, int], rank: int, draws: int, rng: np.random.Generator
) -> dict[str, Float[np.ndarray, "draws"]]:
    spectra = random_spectra(shape, rank, draws, rng)
    return {name: np.array(list(map(compute, spectra))) for name, compute in _RANKS.items()}


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
        pairs = x[:, None] < x[None]
        slopes = ((y[None] - y[:, None])[pairs]) / ((x[None] - x[:, None])[pairs])
        slope = 0.0  # of modules in one layer, such as experts
        if len(slopes):
            slope = np.median(slopes)
        residuals = y - slope * x
        residuals -= np.median(residuals)
        spread = _NORMAL * np.median(np.abs(residuals))
        if spread > 0:
            z[cell.index] = residuals / spread
    return z


def below_null(table: pd.DataFrame, name: str) -> pd.Series:
    """Return the modules whose rank is below the null, at a false discovery rate of ``LEVEL``."""
    p = table[f"{name}_p"].dropna().sort_values()
    passed = p.to_numpy() <= LEVEL * np.arange(1, len(p) + 1) / max(len(p), 1)
    count = np.flatnonzero(passed).max(initial=-1) + 1
    return table.index.to_series().isin(p.index[:count])


def outliers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the modules whose norm is an outlier under the null, the largest first."""
    far = table[table["norm_z"].abs() > OUTLIER]
    return far.reindex(far["norm_z"].abs().sort_values(ascending=False).index)


def _untrained_norms(run: Result, norms: Mapping[str, float]) -> dict[str, float]:
    """Return the root mean square of |dW| of every module before training; NaN if it is not known.

    Parameters
    ----------
    run : Result
        Adapter, or a run, whose initial update is saved unless it is zero.
    norms : mapping module -> float
        |dW| after training.
    """
    if not isinstance(run, Adapter):
        default = 0.0 if run.fact("starts_at_zero", True) else np.nan
        starts = {module: update.norm() for module, update in at_start(run.updates).items() if module in norms}
        return dict.fromkeys(norms, default) | starts
    kind, config = run.files.kind, run.files.config
    return {module: _untrained_norm(kind, config, run.files.parts[module], norm) for module, norm in norms.items()}


def _untrained_norm(kind: str, config: Mapping[str, Any], update: StoredUpdate, norm: float) -> float:
    sigma = _deviation(kind, config, update)
    if sigma == 0 or np.isnan(sigma):
        return sigma
    coefficients = as_float64(next(iter(update._tensors())).read())
    size = float(np.linalg.norm(coefficients))
    if size == 0:
        return np.nan
    return math.sqrt(coefficients.size) * sigma * norm / size


def _deviation(kind: str, config: Mapping[str, Any], update: StoredUpdate) -> float:
    """Return the standard deviation of the coefficients at the start, 0 if the update is zero, NaN if unknown."""
    init = config.get("init_weights")
    outer, inner = update.shape
    # PEFT draws normal values; the uniform ones of C3A have a bound of sqrt(3) deviations.
    if kind == "FourierFT":
        return 0.0 if init else 1.0
    if kind == "WaveFT":
        return 0.01 if init is False else 0.0
    if kind == "C3A":
        deviations = {"gaussian": 1.0, "kaiming_uniform": math.sqrt(1 / (3 * inner))}
        deviations |= {"xavier_uniform": math.sqrt(2 / (outer + inner)), "True": 0.0}
        return deviations.get(str(init or "xavier_uniform"), np.nan)
    start = str(config.get("init_lora_weights", True)).lower()
    if kind in _NONZERO_STARTS or start.startswith(("false", *RESIDUAL_INITS)):
        return np.nan
    return 0.0
