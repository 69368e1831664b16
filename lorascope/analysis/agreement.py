"""How far scores order the same things alike: Spearman's correlation with bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

from lorascope.analysis.stats import CONFIDENCE

DRAWS = 500


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
