"""Kept table ``ranks`` of methods that allocate ranks: its statistics, and the allocators' pairs."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.rank_allocations import depth_thirds, kendall_tau
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.statistics import OfPairs, OfRun
from lorascope.papers.probe import KeptTable
from lorascope.runs.run import Run

ALLOCATION = (truth_names.UNEVEN, truth_names.RANK_2)
"""Truths of the allocators' pairs: modules need different ranks, or the same one."""
UNIFORM_STUDENT, ORACLE = "LoRA, rank 2", "LoRA, planted ranks"
"""Control of the allocators' pairs and its positive control, which AdaLoRA's file trains."""
RANKS = "ranks"
"""Kept table ``module, stack, layer, role, value``: the final rank of every module of a run."""
ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("ffn_in", "ffn_gate", "ffn_out")


def fraction(table: pd.DataFrame, roles: Collection[str]) -> float:
    """Compute the fraction of the total rank of a table of ranks in modules of some roles."""
    return float(table["value"].where(table["role"].isin(roles), 0).sum() / table["value"].sum())


def top_fraction(table: pd.DataFrame) -> float:
    """Compute the fraction of the total rank of a table of ranks in the top third of the layers."""
    return float(table["value"].where(depth_thirds(table) == "top", 0).sum() / table["value"].sum())


def tau(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute Kendall's tau-b between the ranks in the tables of two runs; 0 if all ranks of one are equal."""
    ranks = first.merge(second, on="module", suffixes=("_1", "_2"))[["value_1", "value_2"]]
    # Equal ranks have no order: the agreement is not defined, and counts as none.
    return float(np.nan_to_num(kendall_tau(ranks.to_numpy(np.float64).T)[0, 1]))


def residual_tau(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute ``tau`` of two tables of ranks minus the means of their role and of their layer."""
    return tau(_residuals(first), _residuals(second))


def _residuals(table: pd.DataFrame) -> pd.DataFrame:
    value = table["value"].astype("float64")
    of_role, of_layer = (value.groupby(table[column]).transform("mean") for column in ("role", "layer"))
    # Rounding would order residuals that are equal.
    return table.assign(value=(value - of_role - of_layer + value.mean()).round(9))


def of_roles(arm: str, *roles: str) -> OfRun:
    """Return the fraction of the total rank in modules of some roles, from the kept table of ranks."""
    return OfRun(partial(fraction, roles=roles), RANKS, arm)


def rank_agreement(arm: str, other: str = "") -> OfPairs:
    """Return Kendall's tau between the kept tables of ranks of pairs of runs of one arm, or of two."""
    return OfPairs(tau, RANKS, arm, other or arm)


def keep_ranks(run: Run) -> pd.DataFrame:
    """Return the kept table of ranks, ``ranks``; see ``RANKS``."""
    ranks = run.ranks()
    modules = run.modules.loc[run.modules["module"].isin(ranks), ["module", "stack", "layer", "role"]]
    return modules.assign(value=modules["module"].map(ranks).astype("int16"))


def allocation_tables(arm: str) -> dict[str, list[KeptTable]]:
    """Return the kept tables of an allocator's runs by name: ranks by module, and scores by component.

    ``ranks`` has ``module, planted, rank``, and ``scores`` has ``step, module, component, score`` at the first and the
    last step with scores. ALoRA numbers components in the order of their creation.
    """
    ranks: list[KeptTable] = []
    scores: list[KeptTable] = []
    for truth in ALLOCATION:
        ranks.append(((f"{arm}, {truth}",), partial(_planted_and_final_ranks, truth=truth)))
        scores.append(((f"{arm}, {truth}",), first_and_last_scores))
    return {"ranks": ranks, "scores": scores}


def first_and_last_scores(run: Run) -> pd.DataFrame:
    """Return the kept table ``scores`` of an allocator's run; AutoLoRA has scores at the end of its search only."""
    first_phase, *_ = (*run.parents, run)
    rows = first_phase.table[first_phase.table["quantity"] == "importance"]
    rows = rows[rows["step"].isin([rows["step"].min(), rows["step"].max()])]
    scores = rows[["step", "module", "index", "value"]].rename(columns={"index": "component", "value": "score"})
    return scores.astype({"step": "int32", "module": "str", "component": "int16", "score": "float32"})


def _planted_and_final_ranks(run: Run, truth: str) -> pd.DataFrame:
    from lorascope.papers.setups import planted_truths

    ranks = keep_ranks(run)[["module", "value"]].rename(columns={"value": "rank"})
    planted: Any = 2  # the same for all modules in the other truth
    if truth == truth_names.UNEVEN:
        planted = ranks["module"].map(planted_truths.uneven_ranks(planted_truths.student(), int(run.meta.seed or 0)))
    return ranks.assign(planted=planted).astype({"rank": "int16", "planted": "int16"})
