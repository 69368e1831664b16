"""Baseline rank allocations with the same budget as a learned one: uniform, random, equal parameters.

Pass the result to ``LoRA(rank=...)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lorascope.schema import module_table

__all__ = ["equal_parameters", "random", "uniform"]


def uniform(modules: Sequence[str], budget: int) -> dict[str, int]:
    """Allocate baseline ranks: the same rank in every module, as far as the budget allows.

    Parameters
    ----------
    modules : sequence of str
        Module names in model order.
    budget : int
        Sum of the ranks. The first modules get the remainder, one rank each.

    Returns
    -------
    dict
        Module -> rank; the ranks sum to the budget.

    Raises
    ------
    ValueError
        The budget is below 1, or the module names are empty or not unique.
    """
    _check_budget(modules, budget)
    rank, over = divmod(budget, len(modules))
    return {module: rank + (position < over) for position, module in enumerate(modules)}


def random(modules: Sequence[str], budget: int, seed: int, cap: int | None = None) -> dict[str, int]:
    """Allocate baseline ranks at random, with every component equally likely.

    This is the baseline for an allocator that cannot distinguish components.

    Parameters
    ----------
    modules, budget
        See ``uniform``.
    seed : int
        Random seed. The same seed, modules, budget and cap give the same ranks.
    cap : int, optional
        Number of components to draw from in every module, its initial rank. None (the default) sets no limit.

    Returns
    -------
    dict
        Module -> rank, zeros included; the ranks sum to the budget.

    Raises
    ------
    ValueError
        The budget is below 1 or above ``cap`` times the number of modules, or the module names are empty or not unique.
    """
    _check_budget(modules, budget)
    draw = np.random.default_rng(seed)
    if cap is None:  # every unit of the budget goes to any module with the same probability
        ranks = draw.multinomial(budget, np.full(len(modules), 1 / len(modules)))
    elif budget > cap * len(modules):
        raise ValueError(f"budget must be <= {cap * len(modules)} ({len(modules)} modules of rank {cap}), got {budget}")
    else:  # components are drawn without replacement
        ranks = draw.multivariate_hypergeometric([cap] * len(modules), budget)
    return dict(zip(modules, ranks.tolist(), strict=True))


def equal_parameters(
    modules: pd.DataFrame, groups: Mapping[str, str | Sequence[str]], parameters: int | None = None
) -> dict[str, int]:
    """Compute the baseline ranks that give each group of modules the same number of adapter parameters.

    Parameters
    ----------
    modules : DataFrame
        Module table from ``module_table.describe`` or ``Run.modules``.
    groups : mapping label -> targets
        Roles, module names or a regular expression, as in ``LoRA(targets=...)``.
    parameters : int, optional
        Adapter parameters per group. One rank of a module has ``in_features + out_features`` of them. By default the
        smallest number that every group reaches exactly.

    Returns
    -------
    dict
        Label -> rank.

    Raises
    ------
    ValueError
        No integer rank of a group has exactly this number of parameters.
    """
    matches = {label: module_table.match(modules, targets) for label, targets in groups.items()}
    # A tied weight can be targeted by any of its names, so each name gets a row.
    named_modules = modules.assign(name=(modules["module"] + "," + modules["tied"]).str.split(",")).explode("name")
    sizes = named_modules.set_index("name")[["in_features", "out_features"]].sum(axis=1)
    costs = {label: int(sizes[names].sum()) for label, names in matches.items()}
    if parameters is None:
        parameters = math.lcm(*costs.values())  # the smallest number that is a whole rank of every group
    ranks = {}
    for label, cost in costs.items():
        rank, over = divmod(parameters, cost)
        if over or rank < 1:
            lower = max(rank, 1)  # a number below one rank has only ranks 1 and 2 near it
            near = " or ".join(f"{cost * n:,} (rank {n})" for n in (lower, lower + 1))
            raise ValueError(
                f"parameters must be a multiple of {cost:,} for {label} ({len(matches[label])} modules), "
                f"got {parameters:,}: use {near}"
            )
        ranks[label] = rank
    return ranks


def _check_budget(modules: Sequence[str], budget: int) -> None:
    if not modules or len(set(modules)) < len(modules):
        raise ValueError(f"modules must be one or more unique names, got {', '.join(modules) or 'none'}")
    if budget < 1:
        raise ValueError(f"budget must be >= 1, got {budget}")


def __dir__() -> list[str]:
    return __all__
