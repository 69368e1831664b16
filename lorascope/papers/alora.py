"""ALoRA (Allocating LoRA): rank allocation by ablation.

Does rank move from feed-forward modules to queries and keys, and does accuracy improve? The control applies the same
rules of deletion and growth in the same number of rounds, but to random scores.

Source: ALoRA (arXiv 2403.16187), figure 3 and section 4.5 (rank allocation), table 1 (accuracy).

Departs:

- A small encoder instead of LLaMA-2 7B.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorascope.analysis import rank_allocations
from lorascope.array_types import Int
from lorascope.papers.judging.statistics import Accuracy, OfRun
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import STEPS, Student, planted_arms
from lorascope.papers.probe import Arm, Probe, encoder_settings
from lorascope.papers.rank_tables import (
    ALLOCATION,
    ATTENTION,
    ORACLE,
    RANKS,
    UNIFORM_STUDENT,
    allocation_tables,
    keep_ranks,
    of_roles,
)
from lorascope.runs.run import Run

ADAPTED, RANDOM, UNIFORM = "ALoRA", "ALoRA, random scores", "LoRA, rank 4"
REPLAYS = "replays"
"""Kept table ``group, value, draws, error``: mean fraction of the total rank over replays of a run's rounds."""

DRAWS = 1000


def arms() -> list[Arm]:
    """Return the registered arms of the ALoRA paper: with its scores, with random ones, and LoRA of the same rank."""
    from lorascope.methods import ALoRA, LoRA

    # Scoring takes forward passes for every component, hence a small rank.
    method, settings = ALoRA(init_rank=4, alpha=4.0), encoder_settings()
    return [
        Arm(label=ADAPTED, method=method, settings=settings),
        Arm(label=RANDOM, method=replace(method, scores="random"), settings=settings),
        Arm(label=UNIFORM, method=LoRA(rank=4, alpha=4.0, targets="all-linear"), settings=settings),
    ]


MOVED = "ALoRA, rank 2"


def study_arms() -> list[Arm]:
    """Return the arms of ALoRA's pair; the gap is recorded before the first round, which must not be too early."""
    from lorascope.methods import ALoRA

    # After the default, a tenth of the steps, students at a high rate have closed less than 20 points.
    first_round = STEPS // 5
    method = ALoRA(init_rank=2, alpha=8.0, warm_steps=first_round)
    return planted_arms({MOVED: Student(method, after=first_round - 1)}, ALLOCATION)


JUDGED = {"pair.alora": pair(MOVED, UNIFORM_STUDENT, ORACLE, truths=ALLOCATION)}
KEPT_TABLES = allocation_tables(MOVED)


def replayed(table: pd.DataFrame, group: str) -> float:
    """Return the mean fraction of a group of modules over replays of an ALoRA run's rounds with random scores."""
    return float(table.loc[table["group"] == group, "value"].item())


CLAIMS = {
    "alora.attention": (of_roles(ADAPTED, *ATTENTION), OfRun(partial(replayed, group="attention"), REPLAYS, ADAPTED)),
    "alora.queries": (
        of_roles(ADAPTED, "q", "k") - of_roles(ADAPTED, "v", "o"),
        OfRun(partial(replayed, group="q and k less v and o"), REPLAYS, ADAPTED),
    ),
    "alora.better": (Accuracy(ADAPTED), Accuracy(UNIFORM)),
    "alora.score": (Accuracy(ADAPTED), Accuracy(RANDOM)),
}


def keep_replays(run: Run) -> pd.DataFrame:
    """Return the kept table ``replays`` of the ALoRA paper; see ``REPLAYS``."""
    modules = rank_allocations.current_ranks(run.table)
    ranks = _replay_rounds(run, modules, DRAWS)
    q_k, v_o = (modules["role"].isin(roles).to_numpy(np.float64) for roles in (("q", "k"), ("v", "o")))
    groups = {"attention": q_k + v_o, "q and k less v and o": q_k - v_o}
    fractions = ranks @ np.column_stack(list(groups.values())) / ranks.sum(axis=1, keepdims=True)
    error = fractions.std(axis=0, ddof=1) / np.sqrt(DRAWS)
    return pd.DataFrame({"group": list(groups), "value": fractions.mean(axis=0), "draws": DRAWS, "error": error})


def _replay_rounds(run: Run, modules: pd.DataFrame, draws: int) -> Int[np.ndarray, "draws modules"]:
    """Replay the rounds of a run with random scores: the final ranks of each draw, from those of the run."""
    from lorascope.methods.alora import allocate, prune

    rng = np.random.default_rng(run.seed)
    per_round = run.meta.method["prune"]
    in_block = int(modules.groupby(["stack", "layer"], observed=True).size().max())
    number = {"block": in_block, "network": len(modules)}.get(per_round, per_round)
    # Every round records the score of the whole model once.
    rounds = run.table.loc[run.table["quantity"] == "score_full", "step"].nunique()
    final_ranks = np.full((draws, len(modules)), run.meta.method["init_rank"])
    for ranks in final_ranks:  # rows of the array, which are changed in place
        for _ in range(rounds):
            scores = [rng.random(rank) for rank in ranks]  # new in every round, as after training in between
            pruned = prune(scores, number)
            ranks += allocate(scores, pruned) - np.array(list(map(len, pruned)))
    return final_ranks


PROBE = Probe(
    name="alora",
    title="ALoRA: rank allocation by ablation",
    source="Liu et al., ALoRA: Allocating Low-Rank Adaptation, arXiv 2403.16187",
    question="Does rank move to queries and keys more than with random scores, and does it improve accuracy?",
    arms=arms,
    keep={(RANKS, ADAPTED): keep_ranks, (REPLAYS, ADAPTED): keep_replays},
)

PAPER = PaperStudy(
    name="ALoRA",
    authors="Liu et al.",
    question="Do ALoRA's ranks beat uniform ones where modules need different ranks?",
)
run = PAPER.run
