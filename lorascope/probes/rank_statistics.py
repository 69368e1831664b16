"""Statistics shared by the probes of rank allocators: fractions of the total rank, agreement of runs, accuracy."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from lorascope.analysis import rank_allocations
from lorascope.runs.run import Run
from lorascope.schema import records

ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("ffn_in", "ffn_gate", "ffn_out")
BySeed = dict[int, float]
NEXT_SEED = (
    "Each run is compared with the run of the next seed, and the last with the first. Each run therefore enters two "
    "values, so they are not independent, although the t-interval assumes it. With two seeds, one value counts twice."
)
"""Note for claims that compare consecutive pairs of seeds."""


def final_ranks(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the final ranks of all modules of all runs; see ``rank_allocations.current_ranks``."""
    return rank_allocations.current_ranks(records.concat([run.table for run in runs]))


def role_share(runs: Sequence[Run], found: pd.DataFrame, roles: Collection[str]) -> BySeed:
    """Compute the fraction of each run's total rank in modules of these roles."""
    return _rank_fraction(runs, rank_allocations.shares(found), "role", roles)


def top_share(runs: Sequence[Run], found: pd.DataFrame) -> BySeed:
    """Compute the fraction of each run's total rank in the top third of the layers."""
    return _rank_fraction(runs, rank_allocations.shares(found, "third"), "third", ("top",))


def _rank_fraction(runs: Sequence[Run], shares: pd.DataFrame, by: str, groups: Collection[str]) -> BySeed:
    inside = shares[shares[by].astype("str").isin(groups)].groupby("run", observed=True)["share"].sum()
    return {run.seed: float(inside.get(run.id, 0.0)) for run in runs}


def agreement_with_next(runs: Sequence[Run], found: pd.DataFrame, others: Sequence[Run] | None = None) -> BySeed:
    """Compute Kendall's tau between the ranks of each run and of the next seed's run.

    Tau is 0 if all ranks of a run are equal, because equal ranks have no order.

    Parameters
    ----------
    runs : sequence of Run
        Runs of one arm; the last is compared with the first.
    found : DataFrame
        Ranks from ``final_ranks``, of ``runs`` and ``others``.
    others : sequence of Run, optional
        Compare each run with the run at the same position here instead.

    Returns
    -------
    dict
        Seed of the run in ``runs`` -> tau.
    """
    second = [*runs[1:], runs[0]] if others is None else others
    wide = found.astype({"run": "str", "module": "str"}).pivot(index="run", columns="module", values="value")
    taus = (
        (run.seed, rank_allocations.kendall_tau(wide.loc[[run.id, other.id]].to_numpy())[0, 1])
        for run, other in zip(runs, second, strict=True)
    )
    return {seed: 0.0 if np.isnan(tau) else float(tau) for seed, tau in taus}


def accuracy(runs: Sequence[Run]) -> BySeed:
    """Return the test metric of each run by seed."""
    return {run.seed: run.score.metric for run in runs}
