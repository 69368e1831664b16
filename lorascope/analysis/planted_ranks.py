"""Comparison of the ranks a method finds with planted ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorascope.analysis.rank_allocations import kendall_tau
from lorascope.analysis.score_agreement import spearman
from lorascope.array_types import Float
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


class RankAgreement(NamedTuple):
    """Mean Kendall's tau of allocations: between runs on one teacher, on two, and with the planted ranks."""

    same: float
    different: float
    planted: float


def teacher_agreement(
    allocations: Sequence[Float[np.ndarray, "run module"]], planted: Sequence[Float[np.ndarray, "module"]]
) -> RankAgreement:
    """Compute the agreement of the ranks that runs on two teachers find, with each other and with the planted ranks."""
    first, second = allocations
    agreement = kendall_tau(np.concatenate([first, second, planted]))
    count, total = len(first), len(first) + len(second)
    of_first, of_second = agreement[:count, :count], agreement[count:total, count:total]
    pairs = [block[np.triu_indices(len(block), 1)] for block in (of_first, of_second)]
    with_planted = np.concatenate([agreement[:count, total], agreement[count:total, total + 1]])
    return RankAgreement(
        float(np.mean(np.concatenate(pairs))), float(agreement[:count, count:total].mean()), float(with_planted.mean())
    )


def chance_agreement(
    allocations: Sequence[Float[np.ndarray, "run module"]], planted: Sequence[Float[np.ndarray, "module"]]
) -> RankAgreement:
    """Compute the 95th percentiles of ``teacher_agreement`` if the ranks of every run are shuffled, of 1,000 draws."""
    rng, draws = np.random.default_rng(0), []
    for _ in range(1000):
        draws.append(teacher_agreement([rng.permuted(ranks, axis=1) for ranks in allocations], planted))
    return RankAgreement(*np.quantile(draws, 0.95, axis=0).tolist())
