"""Is a factor shared between domains, or does it tell them apart? Numbers for what a picture of factors suggests.

Sharedness: the share of factors whose nearest neighbour among the factors of the *other* domains belongs to the same
module. Identity: within one module, whether factors of one domain lie nearer to each other than to the rest.

Identity is taken module by module and then averaged. Over all modules at once it is the wrong question: a module's
factors differ from another module's far more than domains do, so that silhouettes by domain are near zero or below,
and neighbours by domain at chance, even where every module parts its domains cleanly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from lorascope.analysis.factor_embeddings import (
    VIEWS,
    Factor,
    FactorSet,
    Updates,
    View,
    clouds,
    common_modules,
    view_factor,
)
from lorascope.updates.low_rank import principal_angles

_TIE = 1e-9  # cosines nearer than this are equal but for rounding, as those of one A_0 with itself are


def numbers(
    updates: Updates,
    domains: Mapping[str, str],
    factors: Sequence[Factor] = ("A", "B"),
    views: Sequence[View] = VIEWS,
    draws: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Sharedness and identity of each factor in each view.

    Parameters
    ----------
    updates : mapping run -> module -> update
        Two runs of every domain, or more.
    domains : mapping run -> str
    factors, views : sequence of str
    draws : int
        Permutations for p-values.
    seed : int
        Of the permutations.

    Returns
    -------
    DataFrame
        ``factor, view``; ``sharedness`` with its ``sharedness_chance``; ``cosine``, the mean over pairs of one module
        and two domains, and for spaces the mean principal ``angle`` of such pairs in degrees; ``neighbour`` and
        ``silhouette`` with their means under permuted domains (``_chance``) and p-values (``_p``).
    """
    rows = []
    for factor in factors:
        for view in views:
            found = clouds(updates, domains, (factor,), view)
            angle = mean_angle(updates, domains, factor) if view == "space" else np.nan
            told = {"factor": factor, "view": view, **sharedness(found), "angle": angle}
            rows.append(told | identity(found, draws, seed))
    return pd.DataFrame(rows)


def retrieval(cloud: FactorSet) -> pd.DataFrame:
    """Of every factor: is its nearest neighbour among other domains' factors of its shape that of the same module?

    Returns
    -------
    DataFrame
        The rows of ``cloud.table()`` with ``same`` (1 or 0; between equally near ones the share that is),
        ``chance`` (1 / modules) and ``cosine``, the mean cosine with the same module in other domains.

    Raises
    ------
    ValueError
        There is one domain alone.
    """
    table = cloud.table()
    other = _differing_domains(cloud.domains)
    if not other.any():
        raise ValueError(f"sharedness compares domains, and there is {cloud.domains[0]!r} alone: give two or more")
    across = np.where(other[None, :, None, :], cloud.cosine, -np.inf)
    nearest = _nearest_fractions(across.reshape(len(table), -1)).reshape(across.shape)
    own = np.eye(len(cloud.modules), dtype=bool)[:, None, :, None]
    same = (nearest * own).sum(axis=(2, 3))
    cosine = (slot_cosines(cloud) * other).sum(axis=2) / other.sum(axis=1)
    return table.assign(same=same.ravel(), chance=1 / len(cloud.modules), cosine=cosine.ravel())


def sharedness(found: Sequence[FactorSet]) -> dict[str, float]:
    """``retrieval`` averaged over all factors."""
    means = pd.concat([retrieval(cloud) for cloud in found])[["same", "chance", "cosine"]].mean()
    return {"sharedness": means["same"], "sharedness_chance": means["chance"], "cosine": means["cosine"]}


def mean_angle(updates: Updates, domains: Mapping[str, str], factor: Factor) -> float:
    """Principal angle in degrees between the spaces of one module in two domains, mean over angles, pairs, modules.

    Modules and errors as of ``clouds``.
    """
    means = []
    for module in common_modules(updates):
        bases = {
            run: view_factor(found[module], factor, "space", f"{module} in run {run}").T
            for run, found in updates.items()
        }
        pairs = [(one, two) for one in bases for two in bases if one < two and domains[one] != domains[two]]
        means += [np.degrees(principal_angles(bases[one], bases[two])).mean() for one, two in pairs]
    return float(np.mean(means))


def identity(found: Sequence[FactorSet], draws: int = 999, seed: int = 0) -> dict[str, float]:
    """Do the factors of one domain lie together, within each module?

    A permutation gives the runs each other's domains, alike in all modules: a label moves between factors of one module
    only, and what the modules of a run have in common (its head, its order of the text) stays in the null, where
    shuffling every module for itself would take it for evidence.

    Parameters
    ----------
    found : sequence of Cloud
        Of the same runs.
    draws : int
        Permutations.
    seed : int
        Of these.

    Returns
    -------
    dict
        ``neighbour``, the share of factors whose nearest neighbour is of their domain, and ``silhouette``, each with
        ``_chance`` (mean under permutation) and ``_p``.

    Raises
    ------
    ValueError
        A domain has one run alone.
    """
    runs = Counter(found[0].domains)
    if alone := [domain for domain, count in runs.items() if count < 2]:
        raise ValueError(f"domain {alone[0]!r} has one run: whether its factors lie together takes two or more")
    _, labels = np.unique(np.array(found[0].domains), return_inverse=True)
    shuffled = np.random.default_rng(seed).permuted(np.tile(labels, (draws, 1)), axis=1)
    drawn = np.concatenate([labels[None], shuffled])
    cosine = np.concatenate([slot_cosines(cloud) for cloud in found])
    told: dict[str, float] = {}
    for name, values in {"neighbour": neighbours(cosine, drawn), "silhouette": silhouettes(cosine, drawn)}.items():
        reached = np.count_nonzero(values >= values[0] - _TIE)  # the first, unpermuted one among them
        told |= {name: float(values[0]), f"{name}_chance": float(values[1:].mean()), f"{name}_p": reached / len(drawn)}
    return told


def slot_cosines(cloud: FactorSet) -> Float[np.ndarray, "slot run run"]:
    """Cosines between the runs' factors of one and the same slot."""
    return np.einsum("sisj->sij", cloud.cosine)


def neighbours(
    cosine: Float[np.ndarray, "slot run run"], labels: Int[np.ndarray, "draw run"]
) -> Float[np.ndarray, "draw"]:
    """Share of the factors whose nearest neighbour has their label, mean over slots and runs, for each labelling."""
    runs = cosine.shape[1]
    nearest = _nearest_fractions(np.where(np.eye(runs, dtype=bool), -np.inf, cosine).reshape(-1, runs)).reshape(
        cosine.shape
    )
    same = labels[:, :, None] == labels[:, None, :]
    return np.einsum("sij,dij->d", nearest, same) / (len(cosine) * runs)


def silhouettes(
    cosine: Float[np.ndarray, "slot run run"], labels: Int[np.ndarray, "draw run"]
) -> Float[np.ndarray, "draw"]:
    """Mean silhouette by label in cosine distance, mean over slots and runs, for each labelling (Rousseeuw 1987).

    Labels count from 0, and each stands for two runs or more.
    """
    distance = np.where(cosine > 1 - _TIE, 0.0, 1 - cosine)
    member = labels[:, :, None] == np.arange(labels.max() + 1)
    counts = member.sum(axis=1)[:, None, None, :]
    sums = np.einsum("sij,djl->dsil", distance, member)
    own = np.broadcast_to(member[:, None], sums.shape)
    inside = (sums / (counts - 1))[own].reshape(sums.shape[:-1])
    outside = np.where(own, np.inf, sums / counts).min(axis=-1)
    larger = np.maximum(inside, outside)
    parted = np.divide(outside - inside, larger, out=np.zeros_like(larger), where=larger > 0)
    return parted.mean(axis=(1, 2))


def _differing_domains(domains: Sequence[str]) -> Bool[np.ndarray, "run run"]:
    names = np.array(domains)
    return names[:, None] != names[None, :]


def _nearest_fractions(cosine: Float[np.ndarray, "point other"]) -> Float[np.ndarray, "point other"]:
    """The nearest of others as shares that sum up to one: equally near ones have equal parts."""
    tied = cosine >= cosine.max(axis=1, keepdims=True) - _TIE
    return tied / tied.sum(axis=1, keepdims=True)
