"""Singular values of updates, and the different definitions of their rank.

Runs record ``effective_rank`` (of sigma / sum sigma). ``entropy_rank`` (of sigma^2 / sum sigma^2),
``participation_rank`` and ``energy_rank`` are included because publications and tools use any of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lorascope import updates as definitions
from lorascope.analysis import initial_update
from lorascope.array_types import Float
from lorascope.runs.layout import Lazy
from lorascope.runs.result import Result

_RANKS = ("stable_rank", "effective_rank", "entropy_rank", "participation_rank", "energy_rank")
_SNAPSHOT = "/singular_values"

Spectra = Mapping[str, Float[np.ndarray, "_"]]


def above_rounding(sigma: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Set the singular values of a spectrum to 0 that are rounding errors of zero, as of components AdaLoRA removed."""
    # Those of a dense update are square roots of eigenvalues, and so are their errors.
    largest = np.max(sigma, initial=0.0)
    return np.where(sigma > np.sqrt(len(sigma) * np.finfo(np.float64).eps) * largest, sigma, 0.0)


def singular_values(run: Result, step: int | None = None) -> Spectra:
    """Return the spectrum of every saved update of a run: singular values by module, largest first, loaded on access.

    They are computed from the factors if these are saved and give the whole update, else read from the spectra saved by
    ``observe.norms``. By default the step is the end of training.

    Raises
    ------
    ValueError
        The run saved no updates at this step.
    """
    incomplete, updates = run.incomplete_updates(step), run.updates(step)
    names = [module for module in updates if module not in incomplete]
    saved_step = step
    if step is None:  # snapshots need an explicit step
        saved_step = run.meta.states["last"].step
    dense = []
    for name in run.snapshot_names():
        module = name.removesuffix(_SNAPSHOT)
        if name.endswith(_SNAPSHOT) and module not in names and saved_step in run.snapshot_steps(name):
            dense.append(module)

    def make(module: str) -> Float[np.ndarray, "_"]:
        if module in names:
            return updates[module].singular_values()
        return run.snapshot(module + _SNAPSHOT, saved_step)["value"].to_numpy(np.float64)

    return Lazy([*names, *dense], make)


def added_values(run: Result, step: int | None = None) -> Spectra:
    """Return the spectra of the learned updates ΔW - ΔW₀, or of ΔW if the initial update was not saved."""
    stored_spectra, learned = singular_values(run, step), initial_update.learned_updates(run, step)
    # Updates that depend on W_0, such as DoRA's, start at zero.
    incomplete = run.incomplete_updates(step)
    names = [module for module in learned if module not in incomplete]

    def make(module: str) -> Float[np.ndarray, "_"]:
        if module in names:
            return learned[module].singular_values()
        return stored_spectra[module]

    return Lazy([*stored_spectra, *names], make)


def tabulate_spectra(spectra: Spectra) -> pd.DataFrame:
    """Return spectra (singular values of updates) as a table.

    Returns
    -------
    DataFrame
        ``module, component`` (from 1), ``sigma``, and ``energy``: the cumulative fraction of ``|dW|_F^2`` (0 if zero).
    """
    tables = []
    for module, sigma in spectra.items():
        energy = np.cumsum(sigma**2)
        total = energy[-1] if len(energy) and energy[-1] > 0 else 1.0
        component = np.arange(1, len(sigma) + 1)
        columns = {"module": module, "component": component, "sigma": sigma, "energy": energy / total}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def rank_definitions(spectra: Spectra) -> pd.DataFrame:
    """Compute the norm and ranks of every module's update from its spectrum; the ranks of a zero update are 0.

    Returns
    -------
    DataFrame
        ``module, update_norm, components, stable_rank, effective_rank, entropy_rank, participation_rank,
        energy_rank``; the last is the number of components with 90% of the energy.
    """
    rows = []
    for module, sigma in spectra.items():
        ranks = {name: getattr(definitions, name)(sigma) for name in _RANKS}
        rows.append({"module": module, "update_norm": float(np.linalg.norm(sigma)), "components": len(sigma)} | ranks)
    return pd.DataFrame(rows)
