"""Selected neurons: their distribution over layers, and the overlap of two selections with its random baseline.

Source: NeFT (arXiv 2403.11621), section 5.4 and table 6 (overlap).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, combinations_with_replacement, product

import pandas as pd

from lorascope.analysis import neurons
from lorascope.analysis.norms import last_recorded, layer_places
from lorascope.files.lazy_scipy import hypergeom
from lorascope.runs.result import Result
from lorascope.schema.module_table import gated_input

Neurons = frozenset[tuple[str, int]]
_MODULE = ["module", "stack", "layer", "role"]


def list_selected(run: Result, k: int | None = None) -> pd.DataFrame:
    """List the neurons a run selected for training, or the k neurons with the largest cosine distance.

    Parameters
    ----------
    run : Run
        A NeFT run, or with ``k`` any run with records of ``neuron_cosine``.
    k : int, optional
        By default the neurons recorded as ``selected``. With a number, the k neurons with the largest
        ``neuron_cosine`` at its last recorded step. For full fine-tuning, NeFT selects the same ones by default.

    Returns
    -------
    DataFrame
        ``module, stack, layer, role, neuron``.
    """
    if k is None:
        rows = run.table[run.table["quantity"] == "selected"]
        return rows[[*_MODULE, "index"]].rename(columns={"index": "neuron"}).reset_index(drop=True)
    return neurons.select_neurons(
        neurons.scores_of_groups(last_scores(run, "neuron_cosine"), _selectable_groups(run)), k, by="value"
    )


def last_scores(run: Result, quantity: str) -> pd.DataFrame:
    """Return the last scores of neurons that a run recorded, for ``neurons.select_neurons`` by ``value``.

    Records of a matrix with fused gate and input only have the role of the module; its first half becomes ``ffn_gate``.
    """
    rows = last_recorded(run.table[run.table["quantity"] == quantity]).astype(
        {"module": "str", "stack": "str", "role": "str"}
    )
    fused = run.modules.astype({"module": "str"})[lambda modules: gated_input(modules).fillna(False)]
    half = rows["module"].map(dict(zip(fused["module"], fused["out_features"] // 2, strict=True)))
    rows["role"] = rows["role"].mask((rows["index"] < half).fillna(False), "ffn_gate")
    return rows[[*_MODULE, "index", "value"]].rename(columns={"index": "neuron"})


def selection_threshold(run: Result, quantity: str) -> float | None:
    """Return the smallest selection score among the selected neurons, or None if no threshold separates them."""
    method = run.meta.method
    # Neurons chosen by hand or from both ends of the ranking are not separated by one threshold.
    by_hand_or_both_ends = method.get("neurons") is not None or method.get("reversed_share")
    if quantity != "selection_cosine" or method.get("select_by") != "changed" or by_hand_or_both_ends:
        return None
    selected = last_scores(run, quantity).merge(list_selected(run).astype({"module": "str"}), on=["module", "neuron"])
    return float(selected["value"].min())


def list_trained(run: Result) -> pd.DataFrame:
    """List every neuron that a run trained: the selected ones, or all those of each module with a nonzero update.

    Raises
    ------
    ValueError
        A NeFT run has no records of ``selected``, so its other neurons cannot be distinguished.
    """
    if (run.table["quantity"] == "selected").any():
        return list_selected(run)
    if run.meta.method["name"] == "neft":
        raise ValueError(
            f"cannot list the trained neurons of NeFT run {run.id}: its records lack 'selected'. Open the folder that "
            "was trained"
        )
    moved = set(run.summary().query("update_norm > 0")["module"])
    every = neurons.unscored_neurons(_selectable_groups(run))
    return every[every["module"].isin(moved)]


def _selectable_groups(run: Result) -> list[neurons.NeuronGroup]:
    """Return the groups with the neurons that a run could select from; for other methods than NeFT, its defaults."""
    roles = run.fact("neuron_roles") or neurons.DEFAULT
    return neurons.list_groups(run.modules.astype({"module": "str"}), tuple(roles))


def count_selectable(run: Result) -> Counter[str]:
    """Count the neurons of each module from which a run's selected neurons are chosen."""
    counts: Counter[str] = Counter()
    for group in _selectable_groups(run):
        counts[group.module] += group.count
    return counts


def count_by_layer(run: Result) -> pd.DataFrame:
    """Count the selected neurons of a run in every layer and role, zeros included.

    Returns
    -------
    DataFrame
        ``run, place, role, value``, and ``chance``: the expected number for as many random neurons.
    """
    selected = list_selected(run)
    counts = selected.groupby([selected["module"].astype("str"), "role"], observed=True).size()
    # Records of a matrix with fused gate and input only have the role of the module, so the groups must use it as well.
    role = run.modules.set_index("module")["role"]
    groups = pd.DataFrame(_selectable_groups(run)).assign(role=lambda rows: rows["module"].map(role))
    available = groups.groupby(_MODULE, sort=False)["count"].sum().reset_index()
    value = [int(counts.get((row.module, row.role), 0)) for row in available.itertuples()]
    chance = available["count"] * len(selected) / available["count"].sum()
    return available.assign(run=run.id, place=layer_places(available), value=value, chance=chance)


def compare_selections(first: Neurons, second: Neurons, pool: int) -> dict[str, float]:
    """Compute the overlap of two selections of neurons out of ``pool``, and its random baseline.

    Returns
    -------
    dict
        ``n_common``, the number of common neurons; ``overlap``, their fraction of the smaller selection; ``jaccard``.
        The random baseline of the overlap is hypergeometric: its mean ``chance`` and its 95th percentile ``most``.
    """
    shared, smaller = len(first & second), min(len(first), len(second))
    baseline = hypergeom(pool, len(first), len(second))
    return {
        "n_common": shared,
        "overlap": shared / smaller,
        "jaccard": shared / len(first | second),
        "chance": float(baseline.mean()) / smaller,
        "most": float(baseline.ppf(0.95)) / smaller,
    }


def compute_expected_overlap(first: Neurons, second: Neurons, sizes: Mapping[str, int]) -> float:
    """Compute the mean overlap of two sets of selected neurons if as many were random in each module.

    This baseline accounts for both selections preferring the same modules; only overlap above it is due to neurons.
    ``sizes`` contains the number of neurons to select from in each module.
    """
    counts, other_counts = (Counter(module for module, _ in selection) for selection in (first, second))
    shared = sum(count * other_counts[module] / sizes[module] for module, count in counts.items())
    return shared / min(len(first), len(second))


def compare_all_selections(choices: Mapping[str, Sequence[Neurons]], pool: int) -> pd.DataFrame:
    """Compare every pair of selections of neurons; each pair of different ones within a label counts once.

    Returns
    -------
    DataFrame
        ``first, second`` (labels) and the values of ``compare_selections``, one row per pair.
    """
    rows = []
    for label, other in combinations_with_replacement(choices, 2):
        # Within a label, a selection is not compared with itself.
        pairs = combinations(choices[label], 2) if label == other else product(choices[label], choices[other])
        for first, second in pairs:
            rows.append({"first": label, "second": other, **compare_selections(first, second, pool)})
    return pd.DataFrame(rows)


def to_set(table: pd.DataFrame) -> Neurons:
    """Convert a table of selected neurons to a set of (module, neuron)."""
    return frozenset(zip(table["module"].astype("str"), table["neuron"].astype(int), strict=True))
