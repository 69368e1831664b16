"""Findings that represent a result: where its update is, how much of its rank is used, and what was not recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from lorascope.files.lazy_pandas import pandas as pd

# Quantity that each observer of any method records; `factors` records the updates themselves.
RECORDED_BY = {
    "gradients": "gradient_norm",
    "memory": "parameter_bytes",
    "neurons": "sensitivity_out",
    "norms": "update_norm",
    "utilization": "utilisation",
}

Lines = list[tuple[str, str]]


def describe_findings(modules: pd.DataFrame, missing: Sequence[str], recorded: set[str], kind: str) -> Lines:
    """Return lines with their keys: the largest update, the used rank, what is missing, and a next call.

    Parameters
    ----------
    modules : DataFrame
        Result of ``Result.summary``.
    missing : sequence of str
        What was not recorded or stored.
    recorded : set of str
        Recorded quantities.
    kind : str
        Kind of the result, which is also the variable of the call.
    """
    norms = modules["update_norm"].to_numpy(np.float64)
    call = f"ls.plots.available({kind})"
    lines: Lines = []
    # The doctor explains an update that is zero or not finite, of which figures show nothing.
    if not np.isfinite(norms).all():
        next_call = f"ls.diagnose({kind})"
        lines.append(("largest", f"|dW| is not finite in {np.count_nonzero(~np.isfinite(norms))} modules"))
    elif norms.any():
        next_call = _choose_figure(modules, recorded, kind) or call
        lines += [("largest", _describe_largest(modules, norms)), *_describe_ranks(modules)]
    elif len(norms):
        next_call = f"ls.diagnose({kind})"
        lines.append(("largest", f"|dW| is zero in all {len(norms)} modules"))
    else:
        next_call = call
    if missing:
        lines.append(("missing", f"{', '.join(missing)}: {call}"))
    return [*lines, ("next", next_call)]


def _describe_largest(modules: pd.DataFrame, norms: np.ndarray) -> str:
    """Describe the layer, the role and the module with the most energy, the squared norm of the update."""
    energies = (norms / norms.max()) ** 2  # a square of a large norm itself would be infinite
    shares = []
    for locations in (_name_layers(modules), "role " + modules["role"]):
        sums = pd.Series(energies).groupby(locations.to_numpy()).sum()
        shares.append((sums.idxmax(), sums.max() / energies.sum()))
    (layer, of_layer), (role, of_role) = shares
    largest = modules["module"].iloc[int(energies.argmax())]
    return f"{layer} has {of_layer:.0%} of |dW|², {role} {of_role:.0%}; most in {largest}"


def _name_layers(modules: pd.DataFrame) -> pd.Series:
    """Name the layer of every module; outside of layers, its role."""
    layers = (modules["stack"] + " layer " + modules["layer"].astype(str)).str.strip()
    return layers.where(modules["layer"].notna(), modules["role"])


def _describe_ranks(modules: pd.DataFrame) -> Lines:
    """Describe how much of their rank the updates use; nothing if no spectrum is known."""
    adapted = modules[modules["rank"].notna()]
    text = describe_effective_ranks(zip(adapted["rank"], adapted["effective_rank"], strict=True))
    if not text:
        return []
    return [("rank", text)]


def describe_effective_ranks(modules: Iterable[tuple[int | None, float]]) -> str:
    """Describe ranks and effective ranks of modules by their means; "" if no effective rank is known."""
    ranks, effective_ranks = [], []
    for rank, effective in modules:
        if rank == 0:  # a module without components has no spectrum
            effective = 0.0
        if rank is not None and not math.isnan(effective):
            ranks.append(rank)
            effective_ranks.append(effective)
    if not ranks:
        return ""
    count = len(ranks)
    text = f"{sum(effective_ranks) / count:.3g} of {sum(ranks) / count:.3g} per module (effective rank)"
    if 0 in ranks:
        text += f"; {ranks.count(0)} of {count} modules have rank 0"
    return text


def _choose_figure(modules: pd.DataFrame, recorded: set[str], kind: str) -> str:
    """Return the call of the figure that shows most of a result, "" if none of these can be drawn."""
    # Equal ranks say nothing, unlike norms by layer.
    if "rank" in recorded and modules["rank"].nunique() > 1:
        return f"ls.plots.rank_allocation({kind})"
    if "update_norm" in recorded and modules["layer"].notna().any():
        return f"ls.plots.update_norm_heat({kind})"
    return ""
