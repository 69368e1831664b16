"""Ranks for a next LoRA: those of a run, or of the components within a budget, with their energy and error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lorascope.array_types import Bool, Float
from lorascope.runs.lora_config import exact_products, next_lora_keywords, no_rank_error
from lorascope.runs.result import Result
from lorascope.updates import LowRank, spectra
from lorascope.updates.low_rank import count_used


@dataclass(frozen=True, eq=False)
class RankBudget:
    """Components of a run's updates by singular value, and those that a rank budget keeps.

    Parameters
    ----------
    sigma : mapping module -> array (rank,)
        Singular values, largest first.
    kept : mapping module -> array (rank,)
        Whether each component is kept.
    sides : mapping module -> int
        Rows plus columns of a module, which is the number of parameters of one component.
    """

    sigma: Mapping[str, Float[np.ndarray, "_"]]
    kept: Mapping[str, Bool[np.ndarray, "_"]]
    sides: Mapping[str, int]

    @property
    def ranks(self) -> dict[str, int]:
        """Number of kept components per module."""
        return {module: int(mask.sum()) for module, mask in self.kept.items()}

    @property
    def energy(self) -> float:
        """Kept fraction of the sum of squared singular values."""
        table = self.modules
        return _share(float(table["energy_kept"].sum()), float(table["energy"].sum()))

    @property
    def error(self) -> float:
        """Frobenius norm of the removed components relative to that of all updates: sqrt(1 - energy)."""
        return _error(self.energy)

    @property
    def modules(self) -> pd.DataFrame:
        """One row per module: rank, kept, parameters, parameters_kept, energy, energy_kept, share, error."""
        rows = []
        for module, sigma in self.sigma.items():
            energy, energy_kept = float(sigma @ sigma), float((sigma**2) @ self.kept[module])
            rank, rank_kept = len(sigma), int(self.kept[module].sum())
            sizes = rank * self.sides[module], rank_kept * self.sides[module]
            rows.append((module, rank, rank_kept, *sizes, energy, energy_kept, _share(energy_kept, energy)))
        names = ["module", "rank", "kept", "parameters", "parameters_kept", "energy", "energy_kept", "share"]
        table = pd.DataFrame(rows, columns=names)
        return table.assign(error=table["share"].map(_error))


def _share(energy_kept: float, energy: float) -> float:
    """Return the kept fraction, which is 1 for a zero update."""
    if energy == 0:
        return 1.0
    return energy_kept / energy


def _error(share: float) -> float:
    # The energies are sums in different orders, so the fraction may exceed 1 by rounding.
    return max(1.0 - share, 0.0) ** 0.5


def select_components(
    run: Result, budget: float, state: str = "last", scores: Mapping[str, Float[np.ndarray, "_"]] | None = None
) -> RankBudget:
    """Select components within a rank budget: those with the largest singular values or scores of all modules.

    Equal ones are selected in the order of modules, and within a module by descending singular value.

    Parameters
    ----------
    run : Run
        Run or loaded adapter.
    budget : float or int
        Fraction of all ranks to keep, in (0, 1], rounded to at least one component; or total rank, an integer >= 2.
    state : {"last", "best"}
        Saved state, "last" by default.
    scores : mapping module -> array, optional
        One score per nonzero singular value, in descending order of the singular values; higher scores are kept first.
        ``component_importance`` returns such scores. Components with singular value 0 have score 0.

    Returns
    -------
    RankBudget

    Raises
    ------
    ValueError
        No module has a factored update of rank >= 1, an update contains NaN or infinity, the budget is out of range, or
        scores of a module are missing.
    """
    updates = run.updates(state=state)
    ranks = {name: rank for name, rank in run.ranks(state).items() if name in updates and rank > 0}
    if not ranks:
        raise no_rank_error(run)
    products = exact_products(run, updates)
    # A residual has twice the rank that trains: two products of which one is constant.
    for name, rank in ranks.items():
        ranks[name] = max(rank, count_used(products[name]))
    return select_from(products, ranks, budget, scores)


def select_from(
    products: Mapping[str, LowRank],
    ranks: Mapping[str, int],
    budget: float,
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
) -> RankBudget:
    """Select components of updates with these ranks within a rank budget; see ``select_components``."""
    sigma = {}
    for (name, rank), spectrum in zip(ranks.items(), spectra([products[name] for name in ranks]), strict=True):
        if not np.isfinite(spectrum).all():
            raise ValueError(f"update of {name} must be finite, got NaN or infinity")
        # A rank may exceed the sides of its module, and a spectrum may not.
        sigma[name] = _padded(spectrum[:rank], rank)
    total = sum(ranks.values())
    count = _count(budget, total)
    values = sigma
    if scores is not None:
        values = {name: _scores(name, scores, rank) for name, rank in ranks.items()}
    best = np.argsort(-np.concatenate(list(values.values())), kind="stable")[:count]  # stable: ties in module order
    masks = np.split(np.isin(np.arange(total), best), np.cumsum(list(ranks.values()))[:-1])
    return RankBudget(sigma, dict(zip(ranks, masks, strict=True)), {name: sum(products[name].shape) for name in ranks})


def truncate(products: Mapping[str, LowRank], selection: RankBudget) -> dict[str, LowRank]:
    """Truncate updates to the components selected within a rank budget, and omit modules that have none.

    The factors of a module are ``U sqrt(sigma)`` and ``sqrt(sigma) V^T``. With the largest components, the result is
    the best approximation of this rank in the Frobenius norm (Eckart and Young, 1936).
    """
    truncated = {}
    for module, mask in selection.kept.items():
        U, sigma, V = products[module].svd()
        used = np.flatnonzero(mask[: len(sigma)])
        root = np.sqrt(sigma[used])
        if len(used):
            truncated[module] = LowRank(U[:, used] * root, root[:, None] * V[:, used].T)
    return truncated


def _scores(name: str, scores: Mapping[str, Float[np.ndarray, "_"]], rank: int) -> Float[np.ndarray, "rank"]:
    values = np.asarray(scores.get(name, []), dtype=np.float64)
    if name not in scores or len(values) > rank or not np.isfinite(values).all():
        raise ValueError(f"scores of {name} must be 0 to {rank} finite numbers, got {values.tolist()}")
    return _padded(values, rank)


def _padded(values: Float[np.ndarray, "k"], rank: int) -> Float[np.ndarray, "rank"]:
    return np.pad(values, (0, rank - len(values)))


def rank_pattern(
    run: Result,
    budget: float | None = None,
    state: str = "last",
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
) -> dict[str, Any]:
    """Return PEFT's keywords to train a LoRA with a run's ranks, or with the ranks that a budget allows.

    With a budget, the rank of a module is the number of components that ``select_components`` keeps. Every module keeps
    its alpha, so that its scale alpha / rank grows as its rank falls: at the scale of a larger rank, a LoRA learns more
    slowly. Only if no rank falls do the keywords equal those of ``Run.lora_config``. HydraLoRA accepts a budget only at
    fixed gate weights, see ``at_gates``.

    Parameters
    ----------
    run, state, scores
        See ``select_components``, also for errors.
    budget : float or int, optional
        See ``select_components``; None, the default, keeps all components.

    Returns
    -------
    dict
        Module names, ranks and alphas as keywords of ``peft.LoraConfig``. Alpha is scale * rank of the run, also for
        rsLoRA, whose scale is alpha / sqrt(rank).
    """
    ranks = run.ranks(state)
    if budget is not None:
        ranks = select_components(run, budget, state, scores).ranks
    return next_lora_keywords(run, ranks, run.updates(state=state))


def _count(budget: float, total: int) -> int:
    if 0 < budget <= 1:  # 1 means all components, so that a total rank of 1 needs a fraction
        return max(round(budget * total), 1)
    if 2 <= budget <= total and float(budget).is_integer():
        return int(budget)
    raise ValueError(f"budget must be a fraction in (0, 1] or a total rank from 2 to {total}, got {budget:g}")
