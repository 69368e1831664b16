"""ALoRA (Allocating LoRA): do ablation scores move rank from the feed-forward matrices to queries and keys?

Source: ALoRA (arXiv 2403.16187), figure 3 and section 4.5 (where the rank goes), table 1 (accuracy).

Departs: a small encoder in place of LLaMA-2 7B. The control moves as many components in as many rounds, but by scores
that are drawn by lot: what the rules of deletion and growth do by themselves.
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
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim
from lorascope.probes.lora import LOW
from lorascope.probes.lora import arms as lora_arms
from lorascope.runs.run import Run

ADAPTED = "ALoRA"
_LOT = "the same after as many rounds with scores drawn by lot"

ATTENTION = Claim(
    sentence="ALoRA moves rank from the feed-forward matrices to attention.",
    statistic="share of the final ranks in attention",
    control=_LOT,
    margin=0.02,
    source="section 4.5, figure 3",
)
QUERY_KEY = Claim(
    sentence="Within attention, queries and keys get more than values and outputs.",
    statistic="share of the final ranks in queries and keys, less that in values and outputs",
    control=_LOT,
    margin=0.02,
    source="section 4.5, figure 3",
)
BETTER = Claim(
    sentence="ALoRA does better than LoRA of the same rank everywhere.",
    statistic="test accuracy of ALoRA, 8 ranks a module on average",
    control="test accuracy of LoRA, rank 8, at the same steps",
    margin=0.002,
    source="table 1",
)


def arms(quick: bool) -> list[Arm]:
    """ALoRA on every linear, and LoRA of the rank it begins with."""
    method = ALoRA(init_rank=8, alpha=8.0, lr=1e-3, head_lr=1e-3)
    method = replace(method, init_rank=2, alpha=2.0, rounds=2, score_rows=8) if quick else method
    uniform = next(arm for arm in lora_arms(quick) if arm.label == LOW)
    # A round scores every component twice: 288 of them on 32 rows cost more than the training between two rounds.
    return [uniform, Arm(label=ADAPTED, method=method, settings=encoder_settings(quick), cost=3.0 if quick else 8.0)]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Shares of the ranks against moves by lot, and accuracy against uniform ranks."""
    adapted, uniform = runs[ADAPTED], runs[LOW]
    found = rank_statistics.final_ranks(adapted)
    lots = pd.concat([randomly_moved_ranks(run, found[found["run"] == run.id]) for run in adapted])

    def leaning(table: pd.DataFrame) -> rank_statistics.BySeed:
        one, other = (rank_statistics.role_share(adapted, table, roles) for roles in (("q", "k"), ("v", "o")))
        return {seed: one[seed] - other[seed] for seed in one}

    roles = rank_statistics.ATTENTION
    verdicts = [
        ATTENTION.judge(
            rank_statistics.role_share(adapted, found, roles), rank_statistics.role_share(adapted, lots, roles)
        ),
        QUERY_KEY.judge(leaning(found), leaning(lots)),
        BETTER.judge(rank_statistics.accuracy(adapted), rank_statistics.accuracy(uniform)),
    ]
    exhibits = [
        exhibit("rank_allocation", plots.rank_allocation({ADAPTED: adapted}, chance=True)),
        exhibit("rank_replay", plots.rank_replay(adapted[0])),
        exhibit("importance", plots.importance(adapted[0])),
        exhibit("training_curves", plots.training_curves({ADAPTED: adapted, LOW: uniform})),
    ]
    notes = [
        "Held fixed: model, text, splits, batch size, number of steps, the rows that components are scored on. Seeds "
        "vary head, adapters, data order, dropout.",
        "A quick run starts from rank 2 and makes two rounds, since scores cost more than steps.",
    ]
    return Findings(verdicts, exhibits, notes=notes)


def randomly_moved_ranks(run: Run, found: pd.DataFrame) -> pd.DataFrame:
    """The final ranks of a run, had each of its rounds scored by lot.

    Parameters
    ----------
    run : Run
    found : DataFrame
        Its ranks by module, whose values are replaced.
    """
    draw = np.random.default_rng(run.meta["seed"])
    sizes = np.full(len(found), run.meta["method"]["init_rank"])
    per_round = run.meta["method"]["prune"]
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
        title="ALoRA: where ablation moves the rank",
        source="Liu et al., ALoRA: Allocating Low-Rank Adaptation, arXiv 2403.16187",
        question="Does rank move to queries and keys, by more than the rules of moving do alone, and does it help?",
        quick_budget=100,
        arms=arms,
        judge=judge,
    )
)
