"""Sensitivity of neurons: sorted within each module, compared with shuffled gradients, between runs and over steps.

A neuron is a row of a linear layer, or a column of the output projection of a feed-forward part (``ffn_out``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorascope.analysis.norms import layer_places
from lorascope.analysis.selected_neurons import Neurons, last_scores, to_set
from lorascope.runs.result import Result

TOP = 0.1
"""Fraction of the neurons of a module that are called its most sensitive ones."""
GRADIENTS = {"value": "recorded", "shuffled": "gradients shuffled"}
"""Columns of ``list_sensitivities`` with a sensitivity, and the gradients that it is computed from."""
# Logarithmic, so that the few most sensitive neurons have most of the axis.
_PERCENTS = np.geomspace(1, 100, 21)
_Z95 = 1.645  # 95th percentile of a normal distribution
_GROUP = ["module", "role"]


class RandomOverlap(NamedTuple):
    """Mean and 95th percentile of the overlap of random neurons, as many in every module."""

    chance: float
    percentile_95: float


def list_sensitivities(run: Result) -> pd.DataFrame:
    """List the sensitivity of every neuron in a block at the last recorded step.

    Returns
    -------
    DataFrame
        ``run, module, stack, layer, place, role, neuron, value``, and ``shuffled``, the expected sensitivity if the
        gradients of the module are shuffled; NaN if it was not recorded. Modules without gradients are omitted.

    Raises
    ------
    ValueError
        The run recorded no sensitivity of a module in a block.
    """
    tables = []
    for side in ("out", "in"):
        scores = last_scores(run, f"sensitivity_{side}")
        null = last_scores(run, f"shuffled_sensitivity_{side}").rename(columns={"value": "shuffled"})
        # Without a recorded null, only the profiles are drawn.
        scores = scores.merge(null[["module", "neuron", "shuffled"]], on=["module", "neuron"], how="left")
        tables.append(scores[scores["layer"].notna() & ((scores["role"] == "ffn_out") == (side == "in"))])
    neurons = pd.concat(tables, ignore_index=True)
    # A module that the loss does not depend on, such as an unused pooler, has no profile.
    neurons = neurons[neurons.groupby("module")["value"].transform("sum") > 0]
    if neurons.empty:
        raise ValueError(f"cannot list neurons of run {run.id}: no module in a block has a recorded sensitivity")
    return neurons.assign(run=run.id, place=layer_places(neurons))


def name_neurons(neurons: pd.DataFrame) -> pd.Series:
    """Return names such as ``3 ffn_in 17``: place, role and number; the module replaces a place and role of several."""
    shared = neurons.groupby(["place", "role"], observed=True)["module"].transform("nunique") > 1
    modules = (neurons["place"].astype("str") + " " + neurons["role"].astype("str")).mask(shared, neurons["module"])
    return modules.astype("str") + " " + neurons["neuron"].astype("str")


def sort_profiles(neurons: pd.DataFrame) -> pd.DataFrame:
    """Sort the neurons of each module by sensitivity.

    Returns
    -------
    DataFrame
        ``run, module, role, gradients, percent, value``: the sensitivity that ``percent`` of the neurons of a module
        reach, as a multiple of the mean of the module, from recorded and from shuffled gradients.
    """
    tables = []
    for (id, role, name), module in neurons.groupby(["run", "role", "module"], observed=True, sort=False):
        for column, gradients in GRADIENTS.items():
            sizes = module[column].to_numpy(np.float64)
            heights = np.quantile(sizes, 1 - _PERCENTS / 100) / sizes.mean()
            columns = {"run": id, "module": name, "role": role, "gradients": gradients}
            tables.append(pd.DataFrame(columns | {"percent": _PERCENTS, "value": heights}))
    return pd.concat(tables, ignore_index=True).dropna()


def most_sensitive(neurons: pd.DataFrame, score: str = "value") -> pd.DataFrame:
    """Return the tenth of the neurons of each module that is most sensitive, at least one; see ``TOP``."""
    sizes = neurons.groupby(["run", *_GROUP], observed=True, sort=False)[score]
    return neurons[sizes.rank(ascending=False, method="first") <= np.ceil(TOP * sizes.transform("size"))]


def top_shares(neurons: pd.DataFrame) -> pd.DataFrame:
    """Compute the fraction of the sensitivity that the most sensitive tenth of the neurons has.

    Returns
    -------
    DataFrame
        ``run, place, role, value``, and ``shuffled``, the same from shuffled gradients: the sum over the modules of a
        cell.
    """
    keys = ["run", "place", "role"]
    shares = {}
    for column in GRADIENTS:
        top = most_sensitive(neurons, column).groupby(keys, observed=True, sort=False)[column].sum()
        shares[column] = top / neurons.groupby(keys, observed=True, sort=False)[column].sum()
    return pd.DataFrame(shares).reset_index()


def sensitive_set(neurons: pd.DataFrame) -> Neurons:
    """Return the most sensitive tenth of the neurons of each module of a run, as (module, neuron)."""
    return to_set(most_sensitive(neurons))


def random_overlap(neurons: pd.DataFrame) -> RandomOverlap:
    """Compute the overlap of two random choices of a tenth of the neurons of each module, with a normal percentile."""
    n = neurons.groupby(_GROUP, observed=True, sort=False).size().to_numpy()
    k = np.ceil(TOP * n)
    # The number of common neurons of a module is hypergeometric.
    variance = k**2 * (n - k) ** 2 / (n**2 * np.maximum(n - 1, 1))
    shared = (k**2 / n).sum()
    return RandomOverlap(shared / k.sum(), (shared + _Z95 * np.sqrt(variance.sum())) / k.sum())


def follow_top(runs: Sequence[Result], k: int) -> pd.DataFrame:
    """Follow the k neurons of a model that are most sensitive compared with their module over the recorded steps.

    Returns
    -------
    DataFrame
        ``name, step, value``, means over runs of the sensitivity as a multiple of the mean of the module. Neurons are
        in the order of their value at the last step. Then follow two references of `top_references`: the k-th largest
        value at each step, of all neurons and, if it was recorded, of the expected sensitivities with shuffled
        gradients.
    """
    tables = []
    for run in runs:
        last = list_sensitivities(run)[["module", "role", "place", "neuron"]].assign(run=run.id, name=name_neurons)
        rows = run.table.rename(columns={"index": "neuron"}).astype({"module": "str", "quantity": "str"})
        for quantity, side in product(("sensitivity", "shuffled_sensitivity"), ("out", "in")):
            neurons = last[(last["role"] == "ffn_out") == (side == "in")]
            courses = rows.loc[rows["quantity"] == f"{quantity}_{side}", ["module", "neuron", "step", "value"]]
            courses = courses.merge(neurons[["run", "module", "role", "neuron", "name"]], on=["module", "neuron"])
            tables.append(courses.assign(quantity=quantity))
    courses = pd.concat(tables, ignore_index=True)
    # All sensitivities change with the size of the gradient, so only multiples show which neurons stand out.
    values = courses.groupby(["run", "quantity", *_GROUP, "step"], observed=True)["value"]
    courses["value"] /= values.transform("mean")
    means = courses.groupby(["quantity", "name", "step"])["value"].mean().reset_index()
    recorded = means[means["quantity"] == "sensitivity"]
    order = recorded[recorded["step"] == recorded["step"].max()].nlargest(k, "value")["name"]
    # Neurons chosen at one step must be compared with those that would be chosen at the others.
    largest = means.groupby(["quantity", "step"])["value"].nlargest(k)
    references = largest.groupby(level=["quantity", "step"]).min().reset_index()
    references["name"] = np.where(references["quantity"] == "sensitivity", *top_references(k))
    rows = pd.concat([recorded.set_index("name").loc[order].reset_index(), references], ignore_index=True)
    return rows[["name", "step", "value"]]


def top_references(k: int) -> tuple[str, str]:
    """Return the names of the rows of ``follow_top`` that are not neurons: the k-th of all, and at random."""
    return f"no. {k} of all", f"no. {k} at random"
