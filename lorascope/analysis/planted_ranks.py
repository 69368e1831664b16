"""Comparison of the ranks a method finds with planted ranks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.analysis.score_agreement import spearman
from lorascope.runs.result import Result


def recovered_ranks(run: Result) -> pd.DataFrame:
    """Return the planted and the found rank of every module with a planted rank.

    Returns
    -------
    DataFrame
        ``run, module, planted, found``; the found rank of a module without an adapter at the end is 0.
    """
    truth = run.table[run.table["quantity"] == "planted_rank"]
    modules = truth["module"].astype("str")
    ranks = run.ranks()
    adapted = [ranks.get(module, 0) for module in modules]  # a method may remove the adapter of a module
    return pd.DataFrame({"run": run.id, "module": modules, "planted": truth["value"], "found": adapted})


def rank_correlation(ranks: pd.DataFrame) -> float:
    """Compute Spearman's correlation of found and planted ranks, see ``recovered_ranks``; 0 if all are equal."""
    rho = float(spearman(ranks[["planted", "found"]].to_numpy(np.float64))[0, 1])
    return 0.0 if np.isnan(rho) else rho  # equal ranks have no order, so the correlation is not defined


def mean_rank_error(ranks: pd.DataFrame) -> float:
    """Compute the mean distance of found from planted ranks over modules, see ``recovered_ranks``."""
    return float((ranks["found"] - ranks["planted"]).abs().mean())
