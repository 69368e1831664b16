"""Measures of whether a factor is shared between domains or specific to one: sharedness and identity.

Sharedness: the fraction of factors whose nearest neighbor among the factors of the *other* domains belongs to the same
module. Identity: within one module, whether factors of one domain are closer to each other than to the rest.

Identity is computed per module and then averaged. Over all modules at once it would be misleading, because factors
differ far more between modules than between domains. Silhouettes by domain are then near zero or below, and nearest
neighbors by domain at chance level, even if every module separates its domains cleanly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

from lorascope.analysis.factor_embeddings import (
    VIEWS,
    Factor,
    FactorSet,
    Updates,
    View,
    build_factor_sets,
    common_modules,
    view_factor,
)
from lorascope.array_types import Float, Int
from lorascope.updates import principal_angles

_TIE = 1e-9  # cosines closer than this are equal up to rounding, for example between copies of an untrained A_0


def measure_sharing(
    updates: Updates,
    domains: Mapping[str, str],
    factors: Sequence[Factor] = ("A", "B"),
    views: Sequence[View] = VIEWS,
    draws: int = 999,
) -> pd.DataFrame:
    """Measure the sharing of each factor between domains in each view: sharedness and identity.

    Parameters
    ----------
    updates, domains, factors
        See ``build_factor_sets``; at least two runs per domain.
    views : sequence of {"raw", "canonical", "space"}
        Views to measure, by default all; see ``factor_embeddings``.
    draws : int
        Number of permutations for the p-values, 999 by default.

    Returns
    -------
    DataFrame
        ``factor, view``; ``sharedness`` and its random baseline ``sharedness_chance``; ``cosine``, the mean over pairs
        of one module in two domains; ``angle``, for spaces the mean principal angle of such pairs in degrees, else
        NaN; ``neighbour`` and ``silhouette``, with means under permuted domains (``_chance``) and p-values (``_p``).

    Raises
    ------
    ValueError
        There is only one domain, a domain has only one run, or the factors cannot be compared.
    """
    rows = []
    for factor in factors:
        for view in views:
            sets = build_factor_sets(updates, domains, (factor,), view)
            angle = mean_angle(updates, domains, factor) if view == "space" else np.nan
            entry = {"factor": factor, "view": view, **sharedness(sets), "angle": angle}
            rows.append(entry | identity(sets, draws))
    return pd.DataFrame(rows)


def retrieve_modules(cloud: FactorSet) -> pd.DataFrame:
    """Find whether each factor is shared: its nearest neighbor in other domains belongs to the same module.

    Returns
    -------
    DataFrame
        The rows of ``cloud.table()`` with ``same`` (1 or 0; with ties, the fraction of tied neighbors that do),
        ``chance`` (1 / modules) and ``cosine``, the mean cosine with the same module in other domains.

    Raises
    ------
    ValueError
        There is only one domain.
    """
    table, names = cloud.table(), np.array(cloud.domains)
    other = names[:, None] != names[None, :]
    if not other.any():
        raise ValueError(f"domains must contain at least 2 different ones, got only {cloud.domains[0]!r}")
    across = np.where(other[None, :, None, :], cloud.cosine, -np.inf)  # -inf excludes factors of the same domain
    nearest = _nearest_fractions(across.reshape(len(table), -1)).reshape(across.shape)
    same_module = np.eye(len(cloud.modules), dtype=bool)[:, None, :, None]
    same = (nearest * same_module).sum(axis=(2, 3))
    cosine = (_slot_cosines([cloud]) * other).sum(axis=2) / other.sum(axis=1)
    return table.assign(same=same.ravel(), chance=1 / len(cloud.modules), cosine=cosine.ravel())


def sharedness(sets: Sequence[FactorSet]) -> dict[str, float]:
    """Compute the sharedness of a factor: the mean of ``retrieve_modules`` over all points."""
    means = pd.concat([retrieve_modules(cloud) for cloud in sets])[["same", "chance", "cosine"]].mean()
    return {"sharedness": means["same"], "sharedness_chance": means["chance"], "cosine": means["cosine"]}


def mean_angle(updates: Updates, domains: Mapping[str, str], factor: Factor) -> float:
    """Measure factor sharing by the mean principal angle in degrees between one module's spaces in two domains.

    The mean is over angles, pairs of runs, and common modules. A factor without direction raises a ValueError.
    """
    pairs = product(updates, repeat=2)  # both orders of each pair, of which the sorted one counts
    across = [(run, other) for run, other in pairs if run < other and domains[run] != domains[other]]
    means = []
    for module in common_modules(updates):
        bases = {
            run: view_factor(modules[module], factor, "space", f"{module} in run {run}").T
            for run, modules in updates.items()
        }
        for first, second in across:
            means.append(np.degrees(principal_angles(bases[first], bases[second])).mean())
    return float(np.mean(means))


def _without_self(cosine: Float[np.ndarray, "slot run run"]) -> Float[np.ndarray, "slot run run"]:
    """Return the cosines within every slot so that no factor is its own neighbor."""
    return np.where(np.eye(cosine.shape[1], dtype=bool), -np.inf, cosine)


def identity(sets: Sequence[FactorSet], draws: int = 999, seed: int = 0) -> dict[str, float]:
    """Measure the opposite of factor sharing: whether factors of one domain cluster together within each module.

    A permutation exchanges the domains of whole runs, in all modules at once. So labels are only exchanged between
    factors of the same module. Similarity within a run, for example due to its head or data order, stays in the null
    distribution. Permuting each module separately would count it as evidence.

    Parameters
    ----------
    sets : sequence of FactorSet
        Sets of the same runs.
    draws, seed : int
        Number (999 by default) and seed of the permutations.

    Returns
    -------
    dict
        ``neighbour``, the fraction of factors whose nearest neighbor has their domain, and ``silhouette``, each with
        ``_chance`` (mean under permutation) and ``_p`` (p-value).

    Raises
    ------
    ValueError
        A domain has only one run.
    """
    runs = Counter(sets[0].domains)
    if single := [domain for domain, count in runs.items() if count < 2]:
        raise ValueError(f"each domain must have at least 2 runs, got 1 of domain {single[0]!r}")
    _, labels = np.unique(np.array(sets[0].domains), return_inverse=True)
    shuffled = np.random.default_rng(seed).permuted(np.tile(labels, (draws, 1)), axis=1)
    labelings = np.concatenate([labels[None], shuffled])  # the first row is the true labeling
    cosine = _slot_cosines(sets)
    other_cosines = _without_self(cosine)
    same = labelings[:, :, None] == labelings[:, None, :]
    nearest = np.einsum("sij,dij->d", _nearest_fractions(other_cosines), same) / other_cosines[..., 0].size
    result: dict[str, float] = {}
    for name, values in {"neighbour": nearest, "silhouette": silhouettes(cosine, labelings)}.items():
        reached = np.count_nonzero(values >= values[0] - _TIE)  # this counts the unpermuted value as well
        result |= {name: float(values[0]), f"{name}_chance": float(values[1:].mean())}
        result[f"{name}_p"] = reached / len(labelings)
    return result


def _slot_cosines(sets: Sequence[FactorSet]) -> Float[np.ndarray, "slot run run"]:
    """Return the cosines between the factors of different runs in the same slot, for the slots of all sets."""
    return np.concatenate([np.einsum("sisj->sij", cloud.cosine) for cloud in sets])


def silhouettes(
    cosine: Float[np.ndarray, "slot run run"], labels: Int[np.ndarray, "draw run"]
) -> Float[np.ndarray, "draw"]:
    """Compute the silhouette of factors by domain, mean over slots and runs, for each labeling (Rousseeuw 1987).

    Labels count from 0, and each labels at least two runs.
    """
    # Rounding would give identical factors a small distance, and so an arbitrary silhouette.
    distance = np.where(cosine > 1 - _TIE, 0.0, 1 - cosine)
    member = labels[:, :, None] == np.arange(labels.max() + 1)
    counts = member.sum(axis=1)[:, None, None, :]
    sums = np.einsum("sij,djl->dsil", distance, member)
    is_label = np.broadcast_to(member[:, None], sums.shape)
    inside = (sums / (counts - 1))[is_label].reshape(sums.shape[:-1])  # the mean excludes the factor itself
    outside = np.where(is_label, np.inf, sums / counts).min(axis=-1)
    larger = np.maximum(inside, outside)
    separation = np.divide(outside - inside, larger, out=np.zeros_like(larger), where=larger > 0)
    return separation.mean(axis=(1, 2))


def _nearest_fractions(cosine: Float[np.ndarray, "*point other"]) -> Float[np.ndarray, "*point other"]:
    """Return for each point the weights of its nearest neighbors: they sum to one, and ties split them evenly."""
    tied = cosine >= cosine.max(axis=-1, keepdims=True) - _TIE
    return tied / tied.sum(axis=-1, keepdims=True)
