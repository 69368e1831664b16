"""The ranks of a next LoRA: a run's own, or those of the components that a budget keeps, and what these are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from lorascope.runs.run import Run
from lorascope.runs.summary import exact_products, peft_keywords
from lorascope.updates.low_rank import LowRank, spectra


@dataclass(frozen=True, eq=False)
class RankBudget:
    """The components of a run's updates, by singular value, and which of them a budget keeps.

    Parameters
    ----------
    sigma : mapping module -> array (rank,)
        Singular values, largest first.
    kept : mapping module -> array (rank,)
    sides : mapping module -> int
        Rows and columns of a module together: the parameters of one component.
    """

    sigma: Mapping[str, Float[np.ndarray, "_"]]
    kept: Mapping[str, Bool[np.ndarray, "_"]]
    sides: Mapping[str, int]

    @property
    def ranks(self) -> dict[str, int]:
        """Components kept of every module."""
        return {module: int(kept.sum()) for module, kept in self.kept.items()}

    @property
    def energy(self) -> float:
        """Share of all squared singular values that is kept."""
        table = self.modules
        return _share(float(table["energy_kept"].sum()), float(table["energy"].sum()))

    @property
    def error(self) -> float:
        """Frobenius norm of what is cut, relative to that of all updates together: sqrt(1 - energy)."""
        return _error(self.energy)

    @property
    def modules(self) -> pd.DataFrame:
        """One row a module: rank, kept, parameters, parameters_kept, energy, energy_kept, share and error of these."""
        rows = []
        for module, sigma in self.sigma.items():
            kept, whole, part = self.kept[module], float(sigma @ sigma), float((sigma**2) @ self.kept[module])
            sizes = len(sigma) * self.sides[module], int(kept.sum()) * self.sides[module]
            rows.append((module, len(sigma), int(kept.sum()), *sizes, whole, part, _share(part, whole)))
        names = ["module", "rank", "kept", "parameters", "parameters_kept", "energy", "energy_kept", "share"]
        table = pd.DataFrame(rows, columns=names)
        return table.assign(error=table["share"].map(_error))


def _share(part: float, whole: float) -> float:
    """Of nothing nothing is lost."""
    return part / whole if whole else 1.0


def _error(share: float) -> float:
    return max(1.0 - share, 0.0) ** 0.5


def select_components(
    run: Run,
    budget: float,
    state: str = "last",
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
) -> RankBudget:
    """Choose components of all modules together, those with the largest singular values or scores.

    Of equal ones those of the module that stands first are kept, and within a module the larger.

    Parameters
    ----------
    run : Run
        Trained here, or an adapter that was read.
    budget : float or int
        Up to 1 the share of all ranks that is kept, rounded, at least one component; a whole number from 2 on is the
        sum of the ranks.
    state : {"last", "best"}
    scores : mapping module -> array, optional
        One for each singular value other than 0, the largest first: the higher, the rather it is kept. Such as
        ``worth.component_importance`` gives. A component of singular value 0 has the score 0.

    Returns
    -------
    RankBudget

    Raises
    ------
    ValueError
        No module has a factored update of a rank above 0, one holds NaN, there is no such budget, or a module lacks
        scores.
    """
    updates = run.updates(state=state)
    ranks = {name: rank for name, rank in run.ranks(state).items() if name in updates and rank > 0}
    if not ranks:
        raise ValueError(f"run {run.id} has no factored update of a rank above 0: there is nothing to configure")
    products = exact_products(run, updates)
    sigma = {name: _padded(_sigma(name, products[name])[:rank], rank) for name, rank in ranks.items()}
    count = _count(budget, sum(ranks.values()))
    values = sigma if scores is None else {name: _scores(name, scores, rank) for name, rank in ranks.items()}
    best = np.argsort(-np.concatenate(list(values.values())), kind="stable")[:count]
    chosen = np.isin(np.arange(sum(ranks.values())), best)
    kept = np.split(chosen, np.cumsum(list(ranks.values()))[:-1])
    return RankBudget(sigma, dict(zip(ranks, kept, strict=True)), {name: sum(products[name].shape) for name in ranks})


def _sigma(name: str, update: LowRank) -> Float[np.ndarray, "k"]:
    sigma = spectra([update])[0]
    if not np.isfinite(sigma).all():
        raise ValueError(f"{name} holds NaN or infinity: it has no singular values to go by")
    return sigma


def _scores(name: str, scores: Mapping[str, Float[np.ndarray, "_"]], rank: int) -> Float[np.ndarray, "rank"]:
    values = np.asarray(scores.get(name, []), dtype=np.float64)
    if name not in scores or len(values) > rank or not np.isfinite(values).all():
        raise ValueError(f"scores of {name} are {values.tolist()}: give it up to {rank} finite numbers")
    return _padded(values, rank)


def _padded(values: Float[np.ndarray, "k"], rank: int) -> Float[np.ndarray, "rank"]:
    return np.pad(values, (0, rank - len(values)))


def rank_pattern(
    run: Run,
    budget: float | None = None,
    state: str = "last",
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
) -> dict[str, Any]:
    """PEFT's keywords for a LoRA with a run's ranks, or with as many of its components as a budget allows.

    A module's rank is the number of its components that ``select_components`` keeps. Every module keeps its scale.
    HydraLoRA has ranks of its own, but no components before its gates are fixed.

    Parameters
    ----------
    run : Run
        Trained here, or an adapter that was read.
    budget : float or int, optional
        See ``select_components``; by default all is kept.
    state : {"last", "best"}
    scores : mapping module -> array, optional
        See ``select_components``.

    Returns
    -------
    dict
        See ``Run.lora_config``.

    Raises
    ------
    ValueError
        See ``select_components``.
    """
    if budget is None:
        return run.lora_config(state)
    return peft_keywords(run, select_components(run, budget, state, scores).ranks, run.updates(state=state))


def _count(budget: float, total: int) -> int:
    if 0 < budget <= 1:
        return max(round(budget * total), 1)
    if budget >= 2 and float(budget).is_integer():
        if budget > total:
            raise ValueError(f"budget {budget:g} is more than the {total} components there are: give {total} or less")
        return int(budget)
    raise ValueError(f"budget {budget:g} is none: give a share, such as 0.5, or a sum of ranks, at most {total}")
