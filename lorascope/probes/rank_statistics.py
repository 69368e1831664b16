"""What the probes of the allocators measure alike: shares of the ranks, agreement of runs, accuracy."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from lorascope.analysis import rank_allocations
from lorascope.runs.run import Run
from lorascope.schema import records

ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("ffn_in", "ffn_gate", "ffn_out")
BySeed = dict[int, float]
# Said where each run is held against that of the next seed.
NEXT_SEED = (
    "Each run is compared with that of the next seed, the last with the first, and so enters two values: they are not "
    "independent, as the t-interval takes them to be. With two seeds each is the other's next: one value counts twice."
)


def final_ranks(runs: Sequence[Run]) -> pd.DataFrame:
    """Ranks of all modules of all runs at the end, as ``rank_allocations.current_ranks`` gives them."""
    return rank_allocations.current_ranks(records.concat([run.table for run in runs]))


def role_share(runs: Sequence[Run], found: pd.DataFrame, roles: Collection[str]) -> BySeed:
    """Share of each run's ranks in modules of these roles."""
    return _rank_fraction(runs, rank_allocations.shares(found), "role", roles)


def top_share(runs: Sequence[Run], found: pd.DataFrame) -> BySeed:
    """Share of each run's ranks in the top third of the layers."""
    return _rank_fraction(runs, rank_allocations.shares(found, "third"), "third", ("top",))


def _rank_fraction(runs: Sequence[Run], shares: pd.DataFrame, by: str, groups: Collection[str]) -> BySeed:
    inside = shares[shares[by].astype("str").isin(groups)].groupby("run", observed=True)["share"].sum()
    return {run.meta["seed"]: float(inside.get(run.id, 0.0)) for run in runs}


def agreement_with_next(runs: Sequence[Run], found: pd.DataFrame, others: Sequence[Run] | None = None) -> BySeed:
    """Kendall's tau between the ranks of each run and of the next one in turn; or of the one beside it in ``others``.

    Where all ranks of a run are the same they order nothing, and tau counts as 0.
    """
    second = [*runs[1:], runs[0]] if others is None else others
    wide = found.astype({"run": "str", "module": "str"}).pivot(index="run", columns="module", values="value")
    taus = (
        (run.meta["seed"], rank_allocations.kendall_tau(wide.loc[[run.id, other.id]].to_numpy())[0, 1])
        for run, other in zip(runs, second, strict=True)
    )
    return {seed: 0.0 if np.isnan(tau) else float(tau) for seed, tau in taus}


def accuracy(runs: Sequence[Run]) -> BySeed:
    """Test metric of each run."""
    return {run.meta["seed"]: run.meta["test"]["metric"] for run in runs}
