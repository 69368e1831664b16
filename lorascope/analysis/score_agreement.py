"""Agreement of scores: Spearman's rank correlation with bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

from lorascope.analysis import selected_neurons
from lorascope.analysis.seed_intervals import CONFIDENCE
from lorascope.array_types import Float
from lorascope.files.lazy_scipy import rankdata
from lorascope.files.printable import printable
from lorascope.runs.result import Result
from lorascope.schema.module_roles import FFN

DRAWS = 500
_ROTATION: dict[str, tuple[str, ...]] = {"1 − cos": ("neuron_cosine",)}
# NeFT trains few neurons, so rotation mostly shows which ones were selected. Its selection score covers all neurons.
_SELECTION_SCORE: dict[str | None, dict[str, tuple[str, ...]]] = {
    "selection_cosine": {"1 − cos after tuning": ("selection_cosine",)},
    # Earlier versions selected by inner products with unnormalized linear probes, ``probe_similarity``.
    "probe_cosine": {"similarity to linear probes": ("probe_cosine", "probe_similarity")},
}
_OTHER_SCORES = {"‖w − w₀‖": ("neuron_update",), "sensitivity": ("sensitivity_out", "sensitivity_in")}


def spearman(columns: Float[np.ndarray, "n scores"]) -> Float[np.ndarray, "scores scores"]:
    """Compute the agreement of every pair of score columns: Spearman's correlation, with mean ranks for ties."""
    ranks = rankdata(columns, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # a constant column has no correlation: NaN
        return np.atleast_2d(np.corrcoef(ranks, rowvar=False))


def correlate(scores: pd.DataFrame) -> pd.DataFrame:
    """Compute the agreement of every pair of scores within every run.

    Parameters
    ----------
    scores : DataFrame
        ``run, module, component`` (-1 for whole modules), ``score, value``: several scores of the same components.

    Returns
    -------
    DataFrame
        ``run, first, second, value, low, high``, pairs in both orders. ``low`` and ``high`` are a 95% bootstrap
        interval over modules (500 draws). Modules are resampled instead of components, because the components of a
        module share their layer and gradient.
    """
    names = list(dict.fromkeys(scores["score"]))
    tables = []
    for run, run_scores in scores.groupby("run", sort=False, observed=True):
        wide = run_scores.pivot(index=["module", "component"], columns="score", values="value")[names]
        modules = [block.to_numpy(np.float64) for _, block in wide.groupby(level="module", sort=False)]
        draw = np.random.default_rng(0)  # the same records always give the same intervals
        samples = np.empty((DRAWS, len(names), len(names)))
        for sample in samples:
            drawn_indices = draw.integers(len(modules), size=len(modules))
            sample[:] = spearman(np.concatenate([modules[index] for index in drawn_indices]))
        low, high = np.nanquantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        pairs = pd.DataFrame(product(names, names), columns=["first", "second"])
        pairs.insert(0, "run", run)
        value = spearman(np.concatenate(modules))
        tables.append(pairs.assign(value=value.ravel(), low=low.ravel(), high=high.ravel()))
    return pd.concat(tables, ignore_index=True)


def collect_neuron_scores(runs: Mapping[str, Result | Sequence[Result]]) -> pd.DataFrame:
    """Collect the scores that recipes give the same feed-forward neurons, to compute their agreement by ``correlate``.

    Parameters
    ----------
    runs : mapping label -> Run or sequence of Run
        Runs trained with ``observe.neurons``; recipes are compared within each seed.

    Returns
    -------
    DataFrame
        ``run`` (the seed), ``module``, ``component`` (the neuron), ``score`` (label and quantity), ``value`` at the
        last recorded step. The quantities are 1 - cos, the norm of the update, and the sensitivity of the neuron's own
        weights: a row of an input or gate projection, a column of an output projection.

        For NeFT, the score it selected by replaces the first: 1 - cos after its full fine-tuning, or similarity to
        linear probes. If it selected neurons at random or by hand, this score is omitted with a warning. A score that
        is the same for all neurons of a run is omitted with a warning as well, and so are neurons without a score.

    Raises
    ------
    ValueError
        A run did not record a quantity, or the recipes have no seed in common.
    """
    tables, seeds = [], []
    for label, group in runs.items():
        members = [group] if isinstance(group, Result) else list(group)
        seeds.append({run.meta.seed for run in members})
        for run in members:
            for name, quantities in (_rotation_scores(run) | _OTHER_SCORES).items():
                values = _last_values(run, quantities)
                tables.append(values.assign(run=run.meta.seed, score=f"{label}: {name}"))
        if not all(map(_rotation_scores, members)):
            reason = "the neurons were selected at random or by hand, so it only shows which ones were selected"
            warnings.warn(f"{printable(label)}: 1 − cos omitted: {reason}", stacklevel=2)
    shared = set.intersection(*seeds)
    if not shared:
        raise ValueError(
            f"cannot compare recipes {', '.join(runs)}: they have no seed in common. Train them with the same seeds"
        )
    scores = pd.concat(tables, ignore_index=True).query("run in @shared").dropna(subset="value")
    equal = scores.groupby(["score", "run"], sort=False)["value"].agg(np.ptp) == 0
    constant = dict.fromkeys(equal[equal].index.get_level_values("score"))
    if constant:
        reason = "the same for every neuron. Check that the recipe trains feed-forward modules"
        warnings.warn(f"{printable(', '.join(constant))} omitted: {reason}", stacklevel=2)
    scores = scores[~scores["score"].isin(list(constant))]
    number = scores["score"].nunique()
    # Correlations need every score of a neuron, so neurons with a missing score are dropped.
    complete = scores.groupby(["run", "module", "component"])["score"].transform("size") == number
    scores["run"] = "seed " + scores["run"].astype(str)
    return scores[complete].reset_index(drop=True)[["run", "module", "component", "score", "value"]]


def _rotation_scores(run: Result) -> dict[str, tuple[str, ...]]:
    """Return the quantity of the neurons' rotation; for NeFT the score it selected by, empty if it used no score."""
    if run.fact("neuron_roles") is None:
        return _ROTATION
    return _SELECTION_SCORE.get(run.fact("selection_score"), {})


def _last_values(run: Result, quantities: Sequence[str]) -> pd.DataFrame:
    """Return the last values of the quantities that together cover the neurons of all roles."""
    tables = []
    for quantity in quantities:
        scores = selected_neurons.last_scores(run, quantity)
        # Sensitivity is recorded for both sides of a matrix; only one of them has the neurons as its vectors.
        side = {"sensitivity_out": FFN[:2], "sensitivity_in": FFN[2:]}.get(quantity, FFN)
        tables.append(scores[scores["role"].isin(side)])
    table = pd.concat(tables)
    if table.empty:
        raise ValueError(
            f"cannot compare neurons of run {run.id}: {quantities[0]} was not recorded. "
            "Train with observe=[ls.observe.neurons()]"
        )
    return table.rename(columns={"neuron": "component"})[["module", "component", "value"]]
