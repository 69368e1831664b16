"""Neurons rotated by training: scores for every neuron of the feed-forward modules, and selection of k neurons.

A neuron is one weight vector: a row of an input or gate projection, or a column of an output projection. Its score is
the cosine distance 1 - cos between its weights before and after training. All layers are ranked together.

Source: NeFT (arXiv 2403.11621), equation 1 and section 4.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index
from typing import Any

import numpy as np
import pandas as pd

from lorascope.array_types import Float
from lorascope.schema.module_roles import FFN
from lorascope.schema.module_table import gated_input, match, position
from lorascope.updates import NeuronChange, neuron_change

COLUMNS = ("module", "stack", "layer", "role", "neuron", *NeuronChange._fields)
ROLES = FFN
DEFAULT = ("ffn_in", "ffn_out")
MODES = ("changed", "reversed", "random")


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons of one role in the weight (out, in) of one module.

    A neuron's ``width`` weights are along ``axis``. The group has ``count`` neurons, numbered from ``first``.
    """

    module: str
    stack: str
    layer: int
    role: str
    axis: int
    first: int
    count: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Slices of the group in the module's weight."""
        neurons, vector = slice(self.first, self.first + self.count), slice(None)
        return (neurons, vector) if self.axis == 1 else (vector, neurons)


def neuron_roles(modules: pd.DataFrame) -> list[str]:
    """Return the neuron roles of a model, including gate projections fused into one matrix with the inputs."""
    present = set(modules["role"])
    if len(modules) and gated_input(modules).fillna(False).any():
        present.add("ffn_gate")
    return [role for role in ROLES if role in present]


def list_groups(modules: pd.DataFrame, roles: Sequence[str] = DEFAULT) -> list[NeuronGroup]:
    """Find the neurons of a model, as groups.

    Parameters
    ----------
    modules : DataFrame
        Module table, ``module_table.describe(model)``.
    roles : sequence of {"ffn_in", "ffn_gate", "ffn_out"}
        Roles to include, by default input and output projections.

    Returns
    -------
    list of NeuronGroup
        Groups in model order. If gate and input are fused in one matrix, the first half of its rows is the gate.
    """
    match(modules, tuple(roles))  # raises an error that names the missing roles
    fused = gated_input(modules).fillna(False)
    groups = []
    for row, is_fused in zip(modules.to_dict("records"), fused, strict=True):
        if not (is_fused or row["role"] in roles):
            continue
        module = (row["module"], row["stack"], int(row["layer"]))
        outer, inner = int(row["out_features"]), int(row["in_features"])
        if is_fused:
            half = outer // 2
            for role, first in (("ffn_gate", 0), ("ffn_in", half)):
                if role in roles:
                    groups.append(NeuronGroup(*module, role, 1, first, half, inner))
        elif row["role"] == "ffn_out":
            groups.append(NeuronGroup(*module, "ffn_out", 0, 0, inner, outer))
        else:
            groups.append(NeuronGroup(*module, row["role"], 1, 0, outer, inner))
    return groups


def score_neurons(
    group: NeuronGroup, original: Float[np.ndarray, "out in"], tuned: Float[np.ndarray, "out in"]
) -> pd.DataFrame:
    """Compute the scores of the neurons of one group from the weight of its module before and after training.

    Returns
    -------
    DataFrame
        The columns ``COLUMNS``, one row per neuron: its number in the module (from 0), 1 - cos, and the norms of its
        weights before, after, and of their difference. 1 - cos is NaN for a neuron that is zero before or after.
    """
    return tabulate_change(group, neuron_change(original[group.slices], tuned[group.slices], group.axis))


def tabulate_change(group: NeuronGroup, change: NeuronChange) -> pd.DataFrame:
    """Tabulate how far training rotated the neurons of one group."""
    return pd.DataFrame(
        {
            "module": group.module,
            "stack": group.stack,
            "layer": pd.array([group.layer] * group.count, dtype="Int16"),
            "role": group.role,
            "neuron": np.arange(group.first, group.first + group.count, dtype=np.int32),
            **change._asdict(),
        }
    )


def rank_neurons(scores: pd.DataFrame, by: str = "cosine_distance") -> pd.DataFrame:
    """Sort the neurons that have a score by the column ``by``, highest first, and add their ``rank`` from 1.

    Ties are broken by position (stack, layer, role, neuron), so the order does not depend on the order of the rows.
    """
    scored = scores[scores[by].notna()]
    modules = scored[["module", "stack", "layer", "role"]].drop_duplicates()
    sort_keys = {module: (position(*place), module) for module, *place in modules.itertuples(index=False)}
    order = {module: number for number, module in enumerate(sorted(sort_keys, key=sort_keys.__getitem__))}
    keys = [scored["neuron"], scored["module"].map(order), -scored[by]]  # lexsort uses its last key first
    scored = scored.iloc[np.lexsort([key.to_numpy() for key in keys])].reset_index(drop=True)
    return scored.assign(rank=np.arange(1, len(scored) + 1, dtype=np.int32))


def unscored_neurons(groups: Sequence[NeuronGroup]) -> pd.DataFrame:
    """Return a table of all neurons with a score of 0, the pool for a random selection."""
    return pd.concat(
        [pd.DataFrame({**asdict(group), "neuron": range(group.first, group.first + group.count)}) for group in groups],
        ignore_index=True,
    ).assign(cosine_distance=0.0)


def scores_of_groups(scores: pd.DataFrame, groups: Sequence[NeuronGroup]) -> pd.DataFrame:
    """Return the scores of the neurons of these groups."""
    module_roles = [(group.module, group.role) for group in groups]
    return scores[pd.MultiIndex.from_frame(scores[["module", "role"]]).isin(module_roles)]


def select_neurons(
    scores: pd.DataFrame, k: int, mode: str = "changed", seed: int | Sequence[int] = 0, by: str = "cosine_distance"
) -> pd.DataFrame:
    """Select exactly k neurons of a model over all layers and projections together.

    Parameters
    ----------
    scores : DataFrame
        ``module, stack, layer, role, neuron``, the column ``by`` and any others.
    k : int
        Number of neurons to select.
    mode : {"changed", "reversed", "random"}
        ``changed`` (default): the k largest scores; by cosine distance, the paper calls these neurons sensitive.
        ``reversed``: the k at the other end of the same order; the two selections are disjoint if there are at least
        2k neurons. ``random``: k random neurons among those with a score.
    seed : int or sequence of int
        Random seed of ``random``, 0 by default.
    by : str
        Column of the score, ``cosine_distance`` by default.

    Returns
    -------
    DataFrame
        The selected rows in the order of selection, with their ``rank``.

    Raises
    ------
    ValueError
        The mode is unknown, fewer than k neurons have a score, or no score is above 0.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    pool = rank_neurons(scores, by)
    if not 0 <= k <= len(pool):
        raise ValueError(
            f"k must be from 0 to {len(pool)} ({len(pool)} of {len(scores)} neurons have a score), got {k}"
        )
    if mode == "random":  # a sorted pool makes the draw independent of the scores
        by_place = pool.sort_values(["module", "neuron"])
        sample = np.random.default_rng(seed).choice(len(pool), size=k, replace=False)
        return by_place.iloc[sample].reset_index(drop=True)
    if not (pool[by] > 0).any():
        raise ValueError(f"cannot select neurons by {by}: no score is above 0")
    if mode == "reversed":
        pool = pool.iloc[::-1]
    return pool.head(k).reset_index(drop=True)


def neurons_by_module(selected: pd.DataFrame) -> dict[str, list[int]]:
    """Return the sorted numbers of neurons by module, from a table of neurons."""
    return {str(module): sorted(map(int, rows["neuron"])) for module, rows in selected.groupby("module", sort=False)}


def to_plain_ints(neurons: Mapping[str, Collection[Any]]) -> dict[str, list[int]]:
    """Convert neuron numbers from any array or list to plain ints.

    Raises
    ------
    ValueError
        A number is not an integer.
    """
    plain: dict[str, list[int]] = {}
    for module, numbers in neurons.items():
        plain[module] = []
        for number in numbers:
            try:
                plain[module].append(index(number))
            except TypeError:
                raise ValueError(f"neurons of {module} must be integers, got {number!r}") from None
    return plain


def check_neurons(neurons: Mapping[str, Collection[int]], groups: Sequence[NeuronGroup]) -> dict[str, list[int]]:
    """Check user-given neurons against the groups of a model, and sort them.

    Raises
    ------
    ValueError
        A module is not a target, a neuron does not exist or is given twice, or no neuron is given.
    """
    available: dict[str, set[int]] = {}
    for group in groups:
        available.setdefault(group.module, set()).update(range(group.first, group.first + group.count))
    for module, numbers in neurons.items():
        if module not in available:
            raise ValueError(f"neurons: unknown module {module!r}; expected one of {', '.join(available)}")
        for number in numbers:
            if number not in available[module]:
                span = f"{min(available[module])} to {max(available[module])}"
                raise ValueError(f"neurons of {module} must be from {span}, got {number}")
        for number, times in Counter(numbers).items():
            if times > 1:
                raise ValueError(f"neurons of {module}: duplicate {number}")
    if not any(neurons.values()):
        raise ValueError("neurons must contain at least 1 neuron, got none")
    return {module: sorted(numbers) for module, numbers in neurons.items() if len(numbers)}


def count_for_share(share: float, parameters: int, width: float) -> int:
    """Compute how many neurons of ``width`` weights make up this fraction of all parameters, the x in NeFT_x%."""
    return round(share * parameters / width)
