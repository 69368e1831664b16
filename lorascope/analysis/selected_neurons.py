"""Chosen neurons: where they lie, and how many of them two choices share, beside what chance would give.

Source: NeFT (arXiv 2403.11621), section 5.4 and table 6 (overlap).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement, product

import pandas as pd
from scipy.stats import hypergeom

from lorascope.analysis import neurons
from lorascope.analysis.norms import place
from lorascope.runs.run import Run
from lorascope.schema.module_table import gated_input

Neurons = frozenset[tuple[str, int]]
_PLACE = ["module", "stack", "layer", "role"]


def chosen(run: Run, k: int | None = None) -> pd.DataFrame:
    """The neurons that a run trained, or those k that it turned most.

    Parameters
    ----------
    run : Run
    k : int, optional
        None takes what was trained: the records of ``selected``. A number chooses anew, by ``neuron_cosine`` at the
        last step that has it: of a full fine-tuning, what NeFT would choose from it by default.

    Returns
    -------
    DataFrame
        ``module, stack, layer, role, neuron``.
    """
    if k is None:
        rows = run.table[run.table["quantity"] == "selected"]
        return rows[[*_PLACE, "index"]].rename(columns={"index": "neuron"}).reset_index(drop=True)
    return neurons.select(neurons.scores_at(scores(run, "neuron_cosine"), _selectable_parts(run)), k, by="value")


def scores(run: Run, quantity: str) -> pd.DataFrame:
    """The neurons' scores that a run recorded, at the last step that has some, for ``neurons.select`` by ``value``.

    Of a matrix that holds gate and input, whose records name the module's role alone, the first half is ``ffn_gate``.
    """
    rows = run.table[run.table["quantity"] == quantity]
    rows = rows[rows["step"] == rows["step"].max()].astype({"module": "str", "stack": "str", "role": "str"})
    both = run.modules.astype({"module": "str"})[lambda modules: gated_input(modules).fillna(False)]
    half = rows["module"].map(dict(zip(both["module"], both["out_features"] // 2, strict=True)))
    rows["role"] = rows["role"].mask((rows["index"] < half).fillna(False), "ffn_gate")
    return rows[[*_PLACE, "index", "value"]].rename(columns={"index": "neuron"})


def threshold(run: Run, quantity: str) -> float | None:
    """The smallest distance by which a neuron was chosen; None where none parts the chosen from the others."""
    method = run.meta["method"]
    by_hand_or_both_ends = method.get("neurons") is not None or method.get("reversed_share")
    if quantity != "selection_cosine" or method.get("mode") != "changed" or by_hand_or_both_ends:
        return None
    both = scores(run, quantity).merge(chosen(run).astype({"module": "str"}), on=["module", "neuron"])
    return float(both["value"].min())


def trained(run: Run) -> pd.DataFrame:
    """Every neuron that a run trained: those chosen, or all of each module whose weight it moved."""
    if (run.table["quantity"] == "selected").any():
        return chosen(run)
    moved = set(run.summary().query("update_norm > 0")["module"])
    every = neurons.unscored_neurons(_selectable_parts(run))
    return every[every["module"].isin(moved)]


def pool(run: Run) -> int:
    """Number of neurons that a run could choose from."""
    return sum(sizes(run).values())


def _selectable_parts(run: Run) -> list[neurons.Part]:
    """Where the neurons lie that a run could choose from, or NeFT by default."""
    method = run.meta["method"]
    roles = tuple(method["targets"]) if method["name"] == "neft" else neurons.DEFAULT
    return neurons.parts(run.modules.astype({"module": "str"}), roles)


def by_layer(run: Run) -> pd.DataFrame:
    """How many neurons of every layer and role a run trained, zeros included.

    Returns
    -------
    DataFrame
        ``run, place, role, value``, and ``chance``: the number if as many were drawn by lot.
    """
    found = chosen(run)
    counts = found.groupby([found["module"].astype("str"), "role"], observed=True).size()
    # Of a matrix that holds gate and input the records name the module's role alone.
    role = run.modules.set_index("module")["role"]
    parts = pd.DataFrame(_selectable_parts(run)).assign(role=lambda rows: rows["module"].map(role))
    held = parts.groupby(_PLACE, sort=False)["count"].sum().reset_index()
    value = [int(counts.get((row.module, row.role), 0)) for row in held.itertuples()]
    chance = held["count"] * len(found) / held["count"].sum()
    return held.assign(run=run.id, place=place(held), value=value, chance=chance)


def common(first: Neurons, second: Neurons, pool: int) -> dict[str, float]:
    """How many neurons two choices share.

    Parameters
    ----------
    first, second : set of (module, neuron)
    pool : int
        Number of neurons to choose from.

    Returns
    -------
    dict
        ``n_common``; ``overlap``, of the smaller choice; ``jaccard``; and by the hypergeometric law, were one of them
        drawn by lot, the mean overlap ``chance`` and ``most``, which 95 of 100 draws do not pass.
    """
    shared, smaller = len(first & second), min(len(first), len(second))
    lot = hypergeom(pool, len(first), len(second))
    return {
        "n_common": shared,
        "overlap": shared / smaller,
        "jaccard": shared / len(first | second),
        "chance": float(lot.mean()) / smaller,
        "most": float(lot.ppf(0.95)) / smaller,
    }


def expected(first: Neurons, second: Neurons, sizes: Mapping[str, int]) -> float:
    """Mean overlap if both drew the neurons within each module by lot, as many as they have there.

    What this explains is that both prefer the same layers; only what lies above it is about neurons.
    """
    counts = [Counter(module for module, _ in each) for each in (first, second)]
    shared = sum(number * counts[1][module] / sizes[module] for module, number in counts[0].items())
    return shared / min(len(first), len(second))


def sizes(run: Run) -> dict[str, int]:
    """Number of neurons that a run could choose from in each module."""
    found: Counter[str] = Counter()
    for part in _selectable_parts(run):
        found[part.module] += part.count
    return dict(found)


def overlaps(choices: Mapping[str, Sequence[Neurons]], pool: int) -> pd.DataFrame:
    """``common`` of every pair of choices, by label; within one label each pair of different choices counts once.

    Returns
    -------
    DataFrame
        ``first, second``, and the columns of ``common``: a row a pair.
    """
    rows = []
    for one, two in combinations_with_replacement(choices, 2):
        same = one == two
        for (i, a), (j, b) in product(enumerate(choices[one]), enumerate(choices[two])):
            if not same or i < j:
                rows.append({"first": one, "second": two, **common(a, b, pool)})
    return pd.DataFrame(rows)


def as_set(found: pd.DataFrame) -> Neurons:
    """Chosen neurons as a set."""
    return frozenset(zip(found["module"].astype("str"), found["neuron"].astype(int), strict=True))
