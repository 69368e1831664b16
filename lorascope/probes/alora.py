"""Probe of ALoRA (Allocating LoRA): rank moved from feed-forward modules to queries and keys, and accuracy.

The control applies the same rules of deletion and growth in the same number of rounds, but to random scores.

Source: ALoRA (arXiv 2403.16187), figure 3 and section 4.5 (rank allocation), table 1 (accuracy).

Departs:

- A small encoder instead of LLaMA-2 7B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Int

from lorascope.evidence.statistics import alora as statistics
from lorascope.evidence.statistics.ranks import RANKS
from lorascope.methods import ALoRA, LoRA
from lorascope.methods.alora import allocate, prune
from lorascope.probes.base import (
    SEEDS_VARY,
    Arm,
    Probe,
    ReportFigure,
    draw,
    encoder_settings,
    registered_settings,
    select,
)
from lorascope.probes.lora import LOW, shared_arms
from lorascope.probes.rank_statistics import ATTENTION, RankFraction, final_ranks, keep_ranks
from lorascope.probes.seed_statistics import EachRun, Runs, accuracy
from lorascope.runs.run import Run

ADAPTED = "ALoRA"
DRAWS = 1000


def arms(quick: bool) -> list[Arm]:
    """Return the arms: ALoRA on all linear layers, and LoRA of rank 8, ALoRA's initial rank in a full run."""
    method = ALoRA(init_rank=8, alpha=8.0, lr=1e-3, head_lr=1e-3)
    method = replace(method, init_rank=2, alpha=2.0, rounds=2, score_rows=8) if quick else method
    # A round scores every component twice. Scoring 288 components on 32 examples costs more than training between
    # rounds.
    adapted = Arm(label=ADAPTED, method=method, settings=encoder_settings(quick), cost=3.0 if quick else 8.0)
    return [*shared_arms(quick, LOW), adapted]


def registered() -> list[Arm]:
    """Return the registered arms: ALoRA with its scores and with random ones, and LoRA of the same rank."""
    method, settings = ALoRA(init_rank=4, alpha=4.0), registered_settings()
    return [
        Arm(label=ADAPTED, method=method, settings=settings),
        Arm(label=statistics.RANDOM, method=replace(method, scores="random"), settings=settings),
        Arm(label=statistics.UNIFORM, method=LoRA(rank=4, alpha=4.0, targets="all-linear"), settings=settings),
    ]


def randomly_moved_ranks(run: Run, found: pd.DataFrame) -> pd.DataFrame:
    """Simulate the final ranks of a run with random scores in each of its rounds.

    Parameters
    ----------
    run : Run
        Run of ALoRA; its seed is the seed of the scores.
    found : DataFrame
        Final ranks of the run by module.

    Returns
    -------
    DataFrame
        ``found`` with the simulated ranks in the column ``value``.
    """
    (sizes,) = _replay_rounds(run, found, 1)
    return found.assign(value=sizes.astype(np.float64))


def _replay_rounds(run: Run, found: pd.DataFrame, draws: int) -> Int[np.ndarray, "draws modules"]:
    """Replay the rounds of a run with random scores: the final ranks of each draw, from those of the run."""
    draw = np.random.default_rng(run.seed)
    per_round = run.meta.method["prune"]
    in_block = int(found.groupby(["stack", "layer"], observed=True).size().max())
    number = {"block": in_block, "network": len(found)}.get(per_round, per_round)
    rounds = run.table.loc[run.table["quantity"] == "score_full", "step"].nunique()
    replayed = np.full((draws, len(found)), run.meta.method["init_rank"])
    for sizes in replayed:
        for _ in range(rounds):
            scores = [draw.random(size) for size in sizes]
            lost = prune(scores, number)
            sizes += allocate(scores, lost) - np.array([len(positions) for positions in lost])
    return replayed


def keep_replays(run: Run) -> pd.DataFrame:
    """Return the kept table ``replays``; see ``evidence.statistics.alora``."""
    found = final_ranks([run])
    ranks = _replay_rounds(run, found, DRAWS)
    q_k, v_o = (found["role"].isin(roles).to_numpy(np.float64) for roles in (("q", "k"), ("v", "o")))
    groups = {"attention": q_k + v_o, "q and k less v and o": q_k - v_o}
    fractions = ranks @ np.column_stack(list(groups.values())) / ranks.sum(axis=1, keepdims=True)
    error = fractions.std(axis=0, ddof=1) / np.sqrt(DRAWS)
    return pd.DataFrame({"group": list(groups), "value": fractions.mean(axis=0), "draws": DRAWS, "error": error})


def random_moves(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the final ranks of the runs under random scores."""
    found = final_ranks(runs)
    return pd.concat([randomly_moved_ranks(run, found[found["run"] == run.id]) for run in runs])


def figures(runs: Runs) -> list[ReportFigure]:
    """Draw the allocation, its history in the first run, and the training curves."""
    first = runs[ADAPTED][0]
    return [
        draw("rank_allocation", select(runs, ADAPTED), chance=True),
        draw("rank_replay", first),
        draw("importance", first),
        draw("training_curves", select(runs, ADAPTED, LOW)),
    ]


PROBE = Probe(
    name="alora",
    title="ALoRA: rank allocation by ablation",
    source="Liu et al., ALoRA: Allocating Low-Rank Adaptation, arXiv 2403.16187",
    question="Does rank move to queries and keys more than with random scores, and does it improve accuracy?",
    quick_budget=100,
    arms=arms,
    registered=registered,
    keep={(RANKS, ADAPTED): keep_ranks, (statistics.REPLAYS, ADAPTED): keep_replays},
    claims={
        "alora.attention": (RankFraction(ADAPTED, ATTENTION), RankFraction(ADAPTED, ATTENTION, random_moves)),
        "alora.queries": (
            RankFraction(ADAPTED, ("q", "k")) - RankFraction(ADAPTED, ("v", "o")),
            RankFraction(ADAPTED, ("q", "k"), random_moves) - RankFraction(ADAPTED, ("v", "o"), random_moves),
        ),
        "alora.better": (EachRun(accuracy, ADAPTED), EachRun(accuracy, LOW)),
    },
    figures=figures,
    notes=lambda runs: [
        "Held fixed: model, data, splits, batch size, number of steps, and the examples that score components. "
        + SEEDS_VARY,
        "A quick run starts from rank 2 and has two rounds, because scoring costs more than training steps.",
    ],
)
