"""Allocations that look at nothing: the controls of a learned one, with the same budget of ranks or parameters.

What they give goes into ``LoRA(rank=...)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lorascope.schema import module_table


def uniform(modules: Sequence[str], budget: int) -> dict[str, int]:
    """The same rank everywhere, as far as the budget can be shared out.

    Parameters
    ----------
    modules : sequence of str
        Module names in model order.
    budget : int
        Sum of the ranks. What is left over goes to the first modules, one rank each.

    Returns
    -------
    dict
        Module -> rank; their sum is the budget.
    """
    _check_budget(modules, budget)
    each, over = divmod(budget, len(modules))
    return {module: each + (place < over) for place, module in enumerate(modules)}


def random(modules: Sequence[str], budget: int, seed: int, cap: int | None = None) -> dict[str, int]:
    """Components drawn by lot, all equally likely: what an allocator does that cannot tell them apart.

    Parameters
    ----------
    modules : sequence of str
        Module names in model order.
    budget : int
        Sum of the ranks.
    seed : int
        The same seed, modules, budget and cap give the same ranks.
    cap : int, optional
        Components that every module has to draw from, its rank at the start. Without one a module may have any rank.

    Returns
    -------
    dict
        Module -> rank, zeros included; their sum is the budget.
    """
    _check_budget(modules, budget)
    draw = np.random.default_rng(seed)
    if cap is None:
        ranks = draw.multinomial(budget, np.full(len(modules), 1 / len(modules)))
    elif budget > cap * len(modules):
        raise ValueError(f"budget {budget} is more than {len(modules)} modules of at most {cap} ranks can hold")
    else:
        ranks = draw.multivariate_hypergeometric([cap] * len(modules), budget)
    return dict(zip(modules, ranks.tolist(), strict=True))


def equal_parameters(
    modules: pd.DataFrame, groups: Mapping[str, str | Sequence[str]], parameters: int | None = None
) -> dict[str, int]:
    """The rank at which each group of modules spends exactly so many parameters as any other.

    Parameters
    ----------
    modules : DataFrame
        As from ``names.describe``, or ``Run.modules``.
    groups : mapping label -> targets
        Roles, module names or a regular expression, as in ``LoRA(targets=...)``.
    parameters : int, optional
        Parameters of the adapters of one group; a rank costs a module ``in_features + out_features``. By default the
        least that every group can spend exactly.

    Returns
    -------
    dict
        Label -> rank.

    Raises
    ------
    ValueError
        No whole rank of a group costs that much.
    """
    chosen = {label: module_table.match(modules, targets) for label, targets in groups.items()}
    # A tied weight is known by each of its names.
    known = modules.assign(name=(modules["module"] + "," + modules["tied"]).str.split(",")).explode("name")
    sizes = known.set_index("name")[["in_features", "out_features"]].sum(axis=1)
    costs = {label: int(sizes[found].sum()) for label, found in chosen.items()}
    if parameters is None:
        parameters = math.lcm(*costs.values())
    ranks = {}
    for label, cost in costs.items():
        rank, over = divmod(parameters, cost)
        if over or rank < 1:
            least = max(rank, 1)
            near = " and ".join(f"{cost * n:,} at rank {n}" for n in (least, least + 1))
            raise ValueError(f"{label}: no whole rank of its {len(chosen[label])} modules costs {parameters:,}; {near}")
        ranks[label] = rank
    return ranks


def _check_budget(modules: Sequence[str], budget: int) -> None:
    if not modules or len(set(modules)) < len(modules):
        raise ValueError(f"ranks are allotted to modules, each named once; got {', '.join(modules) or 'none'}")
    if budget < 1:
        raise ValueError(f"budget {budget} allots nothing: it is a sum of ranks, 1 or more")
