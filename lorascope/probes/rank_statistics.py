"""Statistics of the probes of rank allocators: fractions of the total rank, and agreement between runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lorascope.analysis import rank_allocations
from lorascope.probes.seed_statistics import BySeed, Runs, Statistic, pair_next_seeds
from lorascope.runs.run import Run
from lorascope.schema import records

ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("ffn_in", "ffn_gate", "ffn_out")
NEXT_SEED = (
    "Each run is compared with the run of the next seed, and the last with the first. Each run therefore enters two "
    "values, so they are not independent, although the t-interval assumes it. With two seeds, one value counts twice."
)
"""Note for claims that compare consecutive pairs of seeds."""


def final_ranks(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the final ranks of all modules of all runs; see ``rank_allocations.current_ranks``."""
    return rank_allocations.current_ranks(records.concat([run.table for run in runs]))


def keep_ranks(run: Run) -> pd.DataFrame:
    """Return the kept table ``ranks``; see ``evidence.statistics.ranks``."""
    ranks = run.ranks()
    found = run.modules[run.modules["module"].isin(ranks)]
    return found[["module", "stack", "layer", "role"]].assign(value=found["module"].map(ranks).astype("int16"))


@dataclass(frozen=True)
class RankFraction(Statistic):
    """Fraction of each run's total rank in groups of modules: roles, or thirds of the depth (``by="third"``).

    ``ranks`` is a function of the runs that returns their final ranks, or those of a control.
    """

    arm: str
    groups: Collection[str]
    ranks: Callable[[Sequence[Run]], pd.DataFrame] = final_ranks
    by: str = "role"

    def __call__(self, data: Runs) -> BySeed:
        shares = rank_allocations.shares(self.ranks(data[self.arm]), self.by)
        inside = shares[shares[self.by].astype("str").isin(self.groups)].groupby("run", observed=True)["share"].sum()
        return {run.seed: float(inside.get(run.id, 0.0)) for run in data[self.arm]}


@dataclass(frozen=True)
class RankAgreement(Statistic):
    """Kendall's tau between the ranks of each run and of the next seed's run; the last is compared with the first.

    With ``other``, each run is compared with the run of this arm and the same seed instead. Tau is 0 if all ranks of a
    run are equal, because equal ranks have no order. There is no value for a single seed without ``other``.
    """

    arm: str
    ranks: Callable[[Sequence[Run]], pd.DataFrame] = final_ranks
    other: str | None = None

    def __call__(self, data: Runs) -> BySeed:
        runs = data[self.arm]
        pairs = pair_next_seeds(runs, runs) if self.other is None else list(zip(runs, data[self.other], strict=True))
        if not pairs:
            return {}
        found = self.ranks(list({run.id: run for run in (*runs, *(second for _, second in pairs))}.values()))
        wide = found.astype({"run": "str", "module": "str"}).pivot(index="run", columns="module", values="value")
        taus = {
            run.seed: rank_allocations.kendall_tau(wide.loc[[run.id, other.id]].to_numpy())[0, 1]
            for run, other in pairs
        }
        return {seed: 0.0 if np.isnan(tau) else float(tau) for seed, tau in taus.items()}
