"""How far scores order the same things alike: Spearman's correlation with bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

from lorascope.analysis import selected_neurons
from lorascope.analysis.seed_intervals import CONFIDENCE
from lorascope.files.printable import printable
from lorascope.runs.run import Run
from lorascope.schema.module_roles import FFN

DRAWS = 500
_TURN: dict[str, tuple[str, ...]] = {"1 − cos": ("neuron_cosine",)}
# Of NeFT: how far what it trained has turned says of most neurons only that they were not chosen.
_CHOSEN_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "changed": {"1 − cos after tuning": ("selection_cosine",)},
    "reversed": {"1 − cos after tuning": ("selection_cosine",)},
    # Runs of earlier versions chose by inner products with probes of any norm, ``probe_similarity``.
    "probed": {"likeness to probes": ("probe_cosine", "probe_similarity")},
}
_BESIDE = {"‖w − w₀‖": ("neuron_update",), "sensitivity": ("sensitivity_out", "sensitivity_in")}


def spearman(columns: Float[np.ndarray, "n scores"]) -> Float[np.ndarray, "scores scores"]:
    """Rank correlation of every pair of columns, ties at their mean rank; NaN where a column is constant."""
    ranks = rankdata(columns, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(ranks, rowvar=False))


def correlate(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Correlation of every pair of scores within every run.

    Parameters
    ----------
    scores : DataFrame
        ``run, module, component, score, value``: several scores of the same components, or with component -1 of the
        same modules.
    seed : int
        Of the bootstrap.

    Returns
    -------
    DataFrame
        ``run, first, second, value, low, high``, pairs in both orders. The interval is a bootstrap over modules:
        components of one module share their layer and their gradient, so they are not drawn one by one.
    """
    names = list(dict.fromkeys(scores["score"]))
    tables = []
    for run, found in scores.groupby("run", sort=False, observed=True):
        wide = found.pivot(index=["module", "component"], columns="score", values="value")[names]
        modules = [block.to_numpy(np.float64) for _, block in wide.groupby(level="module", sort=False)]
        draw = np.random.default_rng(seed)
        again = np.empty((DRAWS, len(names), len(names)))
        for sample in again:
            chosen = draw.integers(len(modules), size=len(modules))
            sample[:] = spearman(np.concatenate([modules[place] for place in chosen]))
        low, high = np.nanquantile(again, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        first, second = (part.ravel() for part in np.meshgrid(names, names, indexing="ij"))
        value = spearman(np.concatenate(modules))
        columns = {"first": first, "second": second, "value": value.ravel(), "low": low.ravel(), "high": high.ravel()}
        tables.append(pd.DataFrame(columns).assign(run=run))
    return pd.concat(tables, ignore_index=True)[["run", "first", "second", "value", "low", "high"]]


def neuron_scores(runs: Mapping[str, Run | Sequence[Run]]) -> pd.DataFrame:
    """What several recipes say of the same neurons of the feed-forward parts, for ``correlate``.

    Parameters
    ----------
    runs : mapping label -> Run or sequence of Run
        Trained with ``observe.neurons``; recipes are compared within a seed.

    Returns
    -------
    DataFrame
        ``run`` (the seed), ``module``, ``component`` (the neuron), ``score`` (label and quantity), ``value`` at the
        last step that was looked at: 1 - cos, the norm of the update, and the sensitivity of the neuron's own weights,
        a row of inputs and gates or a column of outputs. Of NeFT the first is what it chose by, 1 - cos after its full
        fine-tuning or likeness to probes; with a warning it is left out where neurons were drawn by lot or given by
        hand. A neuron that lacks a score, such as a zero one, is left out. So is, with a warning, a score that orders
        nothing, since it is the same for all neurons of a run.

    Raises
    ------
    ValueError
        A run recorded none of a quantity, or the recipes share no seed.
    """
    tables, seeds = [], []
    for label, group in runs.items():
        members = [group] if isinstance(group, Run) else list(group)
        seeds.append({run.meta["seed"] for run in members})
        for run in members:
            tables += [
                table.assign(run=run.meta["seed"], score=f"{label}: {name}") for name, table in _neuron_columns(run)
            ]
        if not all(map(_rotation_scores, members)):
            told = "1 − cos: of neurons drawn by lot or given by hand it tells the choice, so left out"
            warnings.warn(f"{printable(label)}: {told}", stacklevel=2)
    shared = set.intersection(*seeds)
    if not shared:
        raise ValueError(f"the recipes {', '.join(runs)} share no seed: train them with the same ones")
    scores = pd.concat(tables, ignore_index=True).query("run in @shared").dropna(subset="value")
    alike = scores.groupby(["score", "run"], sort=False)["value"].agg(np.ptp) == 0
    constant = dict.fromkeys(alike[alike].index.get_level_values("score"))
    if constant:
        told = "the same for every neuron, so left out; does the recipe train feed-forward parts?"
        warnings.warn(f"{printable(', '.join(constant))}: {told}", stacklevel=2)
    scores = scores[~scores["score"].isin(list(constant))]
    number = scores["score"].nunique()
    complete = scores.groupby(["run", "module", "component"])["score"].transform("size") == number
    scores["run"] = "seed " + scores["run"].astype(str)
    return scores[complete].reset_index(drop=True)[["run", "module", "component", "score", "value"]]


def _rotation_scores(run: Run) -> dict[str, tuple[str, ...]]:
    """What says how far a run's neurons turned; of NeFT what it chose by, nothing where that is no score."""
    method = run.meta["method"]
    if method["name"] != "neft":
        return _TURN
    return {} if method.get("neurons") is not None else _CHOSEN_BY.get(method["mode"], {})


def _neuron_columns(run: Run) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each score of a run's neurons."""
    for name, quantities in (_rotation_scores(run) | _BESIDE).items():
        parts = []
        for quantity in quantities:
            found = selected_neurons.scores(run, quantity)
            # Of the two sides of a matrix, the one whose vectors are the neurons.
            side = {"sensitivity_out": FFN[:2], "sensitivity_in": FFN[2:]}.get(quantity, FFN)
            parts.append(found[found["role"].isin(side)])
        table = pd.concat(parts)
        if table.empty:
            raise ValueError(f"run {run.id} recorded no {quantities[0]}: train with observe=[ls.observe.neurons()]")
        yield name, table.rename(columns={"neuron": "component"})[["module", "component", "value"]]
