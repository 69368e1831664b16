"""The ranks of a next LoRA: a run's own, or those of the components that a budget keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorascope.run import Run
from lorascope.summary import factored, peft_keywords
from lorascope.update import LowRank, spectra


def rank_pattern(run: Run, budget: float | int | None = None, state: str = "last") -> dict[str, Any]:
    """PEFT's keywords for a LoRA with a run's ranks, or with as many of its components as a budget allows.

    Under a budget the components with the largest singular values of all modules together are kept, of equal ones those
    of the module that stands first; a module's rank is the number of its own among them. Every module keeps its scale.

    Parameters
    ----------
    run : Run
        Trained here, or an adapter that was read.
    budget : float or int, optional
        Up to 1 the share of all ranks that is kept, rounded, at least one component; a whole number from 2 on is the
        sum of the ranks.
    state : {"last", "best"}

    Returns
    -------
    dict
        See ``Run.lora_config``.

    Raises
    ------
    ValueError
        No module has a factored update of a rank above 0, one holds NaN, or there is no such budget.
    """
    updates = run.updates(state=state)
    ranks = {name: rank for name, rank in run.ranks(state).items() if name in updates and rank > 0}
    if budget is None or not ranks:
        return run.lora_config(state)
    products = factored(run, updates)
    return peft_keywords(run, _largest(ranks, products, _count(budget, sum(ranks.values()))), updates)


def _count(budget: float | int, total: int) -> int:
    if 0 < budget <= 1:
        return max(round(budget * total), 1)
    if budget >= 2 and float(budget).is_integer():
        if budget > total:
            raise ValueError(f"budget {budget:g} is more than the {total} components there are: give {total} or less")
        return int(budget)
    raise ValueError(f"budget {budget:g} is none: give a share, such as 0.5, or a sum of ranks, at most {total}")


def _largest(ranks: Mapping[str, int], updates: Mapping[str, LowRank], count: int) -> dict[str, int]:
    """How many of the ``count`` largest singular values are each module's."""
    sigmas = [np.empty(0)]
    for name, rank in ranks.items():
        sigma = spectra([updates[name]])[0][:rank]
        if not np.isfinite(sigma).all():
            raise ValueError(f"{name} holds NaN or infinity: it has no singular values to go by")
        sigmas.append(np.pad(sigma, (0, rank - len(sigma))))
    owner = np.repeat(np.arange(len(ranks)), list(ranks.values()))
    chosen = owner[np.argsort(-np.concatenate(sigmas), kind="stable")[:count]]
    return dict(zip(ranks, np.bincount(chosen, minlength=len(ranks)).tolist(), strict=True))
