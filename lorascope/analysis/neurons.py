"""Which neurons training turned: scores of every neuron of the feed-forward parts, and the choice of k of them.

A neuron is one vector of weights: a row of an input or gate projection, a column of an output projection. Its score is
the cosine distance 1 - cos between its weights before and after, its place in the ranking that among *all* layers and
projections together.

Source: NeFT (arXiv 2403.11621), equation 1 and section 4.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.schema.module_table import gated_input, match, position
from lorascope.updates.low_rank import NeuronChange, neuron_change

COLUMNS = (
    "module",
    "stack",
    "layer",
    "role",
    "neuron",
    "cosine_distance",
    "norm_original",
    "norm_tuned",
    "delta_norm",
)
ROLES = ("ffn_in", "ffn_gate", "ffn_out")
DEFAULT = ("ffn_in", "ffn_out")
MODES = ("changed", "reversed", "random")


@dataclass(frozen=True)
class Part:
    """The neurons of one role in the weight (out, in) of one module.

    ``axis`` is the axis a neuron's vector runs along, of ``width`` weights; ``count`` neurons lie across it, from
    number ``first`` on.
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
    def where(self) -> tuple[slice, slice]:
        """Index of the part in the module's weight."""
        neurons, vector = slice(self.first, self.first + self.count), slice(None)
        return (neurons, vector) if self.axis == 1 else (vector, neurons)


def neuron_roles(modules: pd.DataFrame) -> list[str]:
    """The roles of the neurons that a model has; its gates may lie in one matrix with the inputs."""
    found = set(modules["role"])
    if len(modules) and gated_input(modules).fillna(False).any():
        found.add("ffn_gate")
    return [role for role in ROLES if role in found]


def parts(modules: pd.DataFrame, roles: Sequence[str] = DEFAULT) -> list[Part]:
    """Where the neurons of a model lie.

    Parameters
    ----------
    modules : DataFrame
        ``names.describe(model)``.
    roles : sequence of {"ffn_in", "ffn_gate", "ffn_out"}

    Returns
    -------
    list of Part
        In model order. Where gate and input are one matrix, the first half of its rows is the gate.
    """
    match(modules, tuple(roles))  # tells what is missing
    fused = gated_input(modules).fillna(False)
    found = []
    for row, both in zip(modules.to_dict("records"), fused, strict=True):
        if not (both or row["role"] in roles):
            continue
        place = (row["module"], row["stack"], int(row["layer"]))
        outer, inner = int(row["out_features"]), int(row["in_features"])
        if both:
            half = outer // 2
            halves = {"ffn_gate": 0, "ffn_in": half}
            found += [Part(*place, role, 1, at, half, inner) for role, at in halves.items() if role in roles]
        else:
            axis = 0 if row["role"] == "ffn_out" else 1
            found.append(Part(*place, row["role"], axis, 0, *((outer, inner) if axis == 1 else (inner, outer))))
    return found


def table(part: Part, original: Float[np.ndarray, "out in"], tuned: Float[np.ndarray, "out in"]) -> pd.DataFrame:
    """Scores of the neurons of one part.

    Parameters
    ----------
    part : Part
    original, tuned : arrays (out, in)
        The weight of its module before and after.

    Returns
    -------
    DataFrame
        The columns ``COLUMNS``, a row for each neuron: its number in the module from 0 on, 1 - cos (NaN for a neuron
        that is zero before or after, which has no direction), and the norms of its weights before, after and of their
        difference.
    """
    return tabulate(part, neuron_change(original[part.where], tuned[part.where], part.axis))


def tabulate(part: Part, change: NeuronChange) -> pd.DataFrame:
    """The table of what became of the neurons of one part."""
    return pd.DataFrame(
        {
            "module": part.module,
            "stack": part.stack,
            "layer": pd.array([part.layer] * part.count, dtype="Int16"),
            "role": part.role,
            "neuron": np.arange(part.first, part.first + part.count, dtype=np.int32),
            **change._asdict(),
        }
    )


def rank_neurons(scores: pd.DataFrame, by: str = "cosine_distance") -> pd.DataFrame:
    """All neurons that have a direction, the highest score ``by`` first, with their ``rank`` from 1 on.

    Equal scores go by place: stack, layer, role (input, gate, output), neuron. So the order is total, and does not
    depend on the order of the rows.
    """
    known = scores[scores[by].notna()]
    modules = known[["module", "stack", "layer", "role"]].drop_duplicates()
    places = {module: (position(*place), module) for module, *place in modules.itertuples(index=False)}
    order = {module: number for number, module in enumerate(sorted(places, key=places.__getitem__))}
    keys = [known["neuron"], known["module"].map(order), -known[by]]
    known = known.iloc[np.lexsort([key.to_numpy() for key in keys])].reset_index(drop=True)
    return known.assign(rank=np.arange(1, len(known) + 1, dtype=np.int32))


def unscored_neurons(places: Sequence[Part]) -> pd.DataFrame:
    """A table of all neurons without scores: what a choice by lot is made from."""
    return pd.concat(
        [pd.DataFrame({**asdict(part), "neuron": range(part.first, part.first + part.count)}) for part in places],
        ignore_index=True,
    ).assign(cosine_distance=0.0)


def scores_at(scores: pd.DataFrame, places: Sequence[Part]) -> pd.DataFrame:
    """The scores of the neurons that lie in these places."""
    known = [(part.module, part.role) for part in places]
    return scores[pd.MultiIndex.from_frame(scores[["module", "role"]]).isin(known)]


def select(
    scores: pd.DataFrame, k: int, mode: str = "changed", seed: int | Sequence[int] = 0, by: str = "cosine_distance"
) -> pd.DataFrame:
    """Choose exactly k neurons, of all layers and projections together.

    Parameters
    ----------
    scores : DataFrame
        ``module, stack, layer, role, neuron``, the column ``by`` and any others.
    k : int
    mode : {"changed", "reversed", "random"}
        ``changed``: the k with the largest score; by cosine distance, the paper calls these sensitive. ``reversed``:
        the k at the other end of the same order, so that the two share none as long as 2k neurons are there.
        ``random``: k drawn by lot from those that could be chosen.
    seed : int or sequence of int
        Of the lot.
    by : str
        Column of the score.

    Returns
    -------
    DataFrame
        The chosen rows in the order of choice, with their ``rank``.

    Raises
    ------
    ValueError
        There are fewer than k neurons with a direction, or nothing has turned, or the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: {', '.join(MODES)}")
    pool = rank_neurons(scores, by)
    if not 0 <= k <= len(pool):
        raise ValueError(
            f"k {k} is no choice: give 0 to {len(pool)} neurons ({len(pool)} of {len(scores)} have a direction)"
        )
    if mode == "random":
        by_place = pool.sort_values(["module", "neuron"])
        drawn = np.random.default_rng(seed).choice(len(pool), size=k, replace=False)
        return by_place.iloc[drawn].reset_index(drop=True)
    if not (pool[by] > 0).any():
        raise ValueError("no neuron has turned between the two checkpoints: there is nothing to choose by")
    return (pool if mode == "changed" else pool.iloc[::-1]).head(k).reset_index(drop=True)


def by_module(selected: pd.DataFrame) -> dict[str, list[int]]:
    """The numbers of chosen neurons, in order, by module."""
    return {str(module): sorted(map(int, rows["neuron"])) for module, rows in selected.groupby("module", sort=False)}


def to_plain_ints(given: Mapping[str, Collection[Any]]) -> dict[str, list[int]]:
    """Neurons given by hand as plain ints, whichever array or list they came in.

    Raises
    ------
    ValueError
        One is no whole number.
    """
    return {module: [_to_whole_number(module, number) for number in numbers] for module, numbers in given.items()}


def _to_whole_number(module: str, number: Any) -> int:
    try:
        return index(number)
    except TypeError:
        raise ValueError(f"neurons: {module} has no neuron {number!r}: give whole numbers") from None


def check_neurons(chosen: Mapping[str, Collection[int]], places: Sequence[Part]) -> dict[str, list[int]]:
    """Neurons given by hand, in order.

    Raises
    ------
    ValueError
        A module has no neurons among the targets, or not that one, or one is given twice.
    """
    known: dict[str, set[int]] = {}
    for part in places:
        known.setdefault(part.module, set()).update(range(part.first, part.first + part.count))
    for module, numbers in chosen.items():
        if module not in known:
            raise ValueError(f"neurons: {module!r} is no module of the targets; these are {', '.join(known)}")
        if wrong := [number for number in numbers if number not in known[module]]:
            span = f"{min(known[module])} to {max(known[module])}"
            raise ValueError(f"neurons: {module} has no neuron {wrong[0]}: its numbers are {span}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"neurons: {module} has a neuron twice: give each once")
    if not any(chosen.values()):
        raise ValueError("neurons names none: give at least one")
    return {module: sorted(numbers) for module, numbers in chosen.items() if len(numbers)}


def count(share: float, parameters: int, width: float) -> int:
    """How many neurons of ``width`` weights hold this share of all parameters; the x of NeFT_x% is such a share."""
    return round(share * parameters / width)
