"""Probe of ALoRA (Allocating LoRA): rank moved from feed-forward modules to queries and keys, and accuracy.

The control applies the same rules of deletion and growth in the same number of rounds, but to random scores.

Source: ALoRA (arXiv 2403.16187), figure 3 and section 4.5 (rank allocation), table 1 (accuracy).

Departs:

- A small encoder instead of LLaMA-2 7B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.methods import ALoRA
from lorascope.methods.alora import allocate, prune
from lorascope.probes import rank_statistics
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, make_report_figure, register
from lorascope.probes.claims import Claim
from lorascope.probes.lora import LOW
from lorascope.probes.lora import arms as lora_arms
from lorascope.runs.run import Run

ADAPTED = "ALoRA"
_RANDOM = "the same with random scores and the same number of rounds"

ATTENTION = Claim(
    sentence="ALoRA moves rank from feed-forward modules to attention modules, more than with random scores.",
    statistic="fraction of the final total rank in attention modules",
    control=_RANDOM,
    margin=0.02,
    source="section 4.5, figure 3",
)
QUERY_KEY = Claim(
    sentence="Within attention, ALoRA gives queries and keys more rank than values and outputs.",
    statistic="fraction of the final total rank in queries and keys, minus the fraction in values and outputs",
    control=_RANDOM,
    margin=0.02,
    source="section 4.5, figure 3",
)
BETTER = Claim(
    sentence="ALoRA outperforms LoRA with uniform ranks and the same total rank.",
    statistic="test accuracy of ALoRA with a mean rank of 8",
    control="test accuracy of LoRA, rank 8, after the same number of steps",
    margin=0.002,
    source="table 1",
)


def arms(quick: bool) -> list[Arm]:
    """Return the arms: ALoRA on all linear layers, and LoRA of rank 8, ALoRA's initial rank in a full run."""
    method = ALoRA(init_rank=8, alpha=8.0, lr=1e-3, head_lr=1e-3)
    method = replace(method, init_rank=2, alpha=2.0, rounds=2, score_rows=8) if quick else method
    uniform = next(arm for arm in lora_arms(quick) if arm.label == LOW)
    # A round scores every component twice. Scoring 288 components on 32 examples costs more than training between
    # rounds.
    return [uniform, Arm(label=ADAPTED, method=method, settings=encoder_settings(quick), cost=3.0 if quick else 8.0)]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Compare the fractions of the rank with those under random scores, and the accuracy with uniform ranks."""
    adapted, uniform = runs[ADAPTED], runs[LOW]
    found = rank_statistics.final_ranks(adapted)
    drawn = pd.concat([randomly_moved_ranks(run, found[found["run"] == run.id]) for run in adapted])

    def query_key_excess(table: pd.DataFrame) -> rank_statistics.BySeed:
        one, other = (rank_statistics.role_share(adapted, table, roles) for roles in (("q", "k"), ("v", "o")))
        return {seed: one[seed] - other[seed] for seed in one}

    roles = rank_statistics.ATTENTION
    verdicts = [
        ATTENTION.judge(
            rank_statistics.role_share(adapted, found, roles), rank_statistics.role_share(adapted, drawn, roles)
        ),
        QUERY_KEY.judge(query_key_excess(found), query_key_excess(drawn)),
        BETTER.judge(rank_statistics.accuracy(adapted), rank_statistics.accuracy(uniform)),
    ]
    figures = [
        make_report_figure("rank_allocation", plots.rank_allocation({ADAPTED: adapted}, chance=True)),
        make_report_figure("rank_replay", plots.rank_replay(adapted[0])),
        make_report_figure("importance", plots.importance(adapted[0])),
        make_report_figure("training_curves", plots.training_curves({ADAPTED: adapted, LOW: uniform})),
    ]
    notes = [
        "Held fixed: model, data, splits, batch size, number of steps, and the examples that score components. Seeds "
        "vary the classifier head, adapter initialization, data order and dropout.",
        "A quick run starts from rank 2 and has two rounds, because scoring costs more than training steps.",
    ]
    return Findings(verdicts, figures, notes=notes)


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
    draw = np.random.default_rng(run.seed)
    sizes = np.full(len(found), run.meta.method["init_rank"])
    per_round = run.meta.method["prune"]
    in_block = int(found.groupby(["stack", "layer"], observed=True).size().max())
    number = {"block": in_block, "network": len(found)}.get(per_round, per_round)
    for _ in range(run.table.loc[run.table["quantity"] == "score_full", "step"].nunique()):
        scores = [draw.random(size) for size in sizes]
        lost = prune(scores, number)
        sizes = sizes - np.array([len(positions) for positions in lost]) + allocate(scores, lost)
    return found.assign(value=sizes.astype(np.float64))


PROBE = register(
    Probe(
        name="alora",
        title="ALoRA: rank allocation by ablation",
        source="Liu et al., ALoRA: Allocating Low-Rank Adaptation, arXiv 2403.16187",
        question="Does rank move to queries and keys more than with random scores, and does it improve accuracy?",
        quick_budget=100,
        arms=arms,
        judge=judge,
    )
)
