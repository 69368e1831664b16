"""Kept tables of methods that allocate ranks: planted and final ranks by module, and scores by component."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd

from lorascope.papers.arms import KeptTable
from lorascope.papers.judging import truth_names
from lorascope.runs.run import Run

ALLOCATION = (truth_names.UNEVEN, truth_names.RANK_2)
"""Truths of the allocators' pairs: modules need different ranks, or the same one."""
UNIFORM_STUDENT, ORACLE = "LoRA, rank 2", "LoRA, planted ranks"
"""Control of the allocators' pairs and its positive control, which AdaLoRA's file trains."""


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

    by_module = run.ranks()
    ranks = run.modules.loc[run.modules["module"].isin(by_module), ["module"]]
    ranks = ranks.assign(rank=ranks["module"].map(by_module))
    planted: Any = 2  # the same for all modules in the other truth
    if truth == truth_names.UNEVEN:
        planted = ranks["module"].map(planted_truths.uneven_ranks(planted_truths.student(), int(run.meta.seed or 0)))
    return ranks.assign(planted=planted).astype({"rank": "int16", "planted": "int16"})
