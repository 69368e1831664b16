"""AdaLoRA: does importance give rank to feed-forward matrices and upper layers, and is it worth it?

Source: AdaLoRA (arXiv 2303.10512), figure 3 and section 4.4 (where the rank goes), table 1 (accuracy).

Departs: a small encoder in place of DeBERTaV3-base, and a run of hundreds of steps. The authors' own parameter counts
allow fewer ranks in feed-forward matrices than the text of the paper says, so the claim may fail there, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorascope import plots
from lorascope.analysis import rank_allocations
from lorascope.methods import AdaLoRA
from lorascope.probes import rank_statistics
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim
from lorascope.probes.lora import LOW
from lorascope.probes.lora import arms as lora_arms
from lorascope.runs.run import Run

ADAPTED = "AdaLoRA, from rank 12 to 8"
_LOT = "the same for ranks drawn by lot, of the same budget"

FEED_FORWARD = Claim(
    sentence="AdaLoRA gives the feed-forward matrices more than their part of the ranks.",
    statistic="share of the final ranks in feed-forward matrices",
    control=_LOT,
    margin=0.02,
    source="section 4.4, figure 3",
)
TOP = Claim(
    sentence="AdaLoRA gives the upper layers more than their part of the ranks.",
    statistic="share of the final ranks in the top third of the layers",
    control=_LOT,
    margin=0.02,
    source="section 4.4, figure 3",
)
STABLE = Claim(
    sentence="The ranks are those of the task: another seed finds the same.",
    statistic="Kendall's tau between the ranks of a seed and of the next",
    control=_LOT,
    margin=0.1,
    source="section 4.4",
)
BETTER = Claim(
    sentence="AdaLoRA does better than LoRA of the same rank everywhere.",
    statistic="test accuracy of AdaLoRA, 8 ranks a module in the end",
    control="test accuracy of LoRA, rank 8, at the same steps",
    margin=0.002,
    source="table 1",
)


def arms(quick: bool) -> list[Arm]:
    """AdaLoRA on every linear, and LoRA of the rank it ends with."""
    method = AdaLoRA(init_rank=12, target_rank=8)
    uniform = next(arm for arm in lora_arms(quick) if arm.label == LOW)
    return [uniform, Arm(label=ADAPTED, method=method, settings=encoder_settings(quick), cost=1.1)]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Shares and stability of the ranks against ranks drawn by lot, and accuracy against uniform ranks."""
    adapted, uniform = runs[ADAPTED], runs[LOW]
    found = rank_statistics.final_ranks(adapted)
    lots = rank_allocations.random_ranks(found, cap=adapted[0].meta["method"]["init_rank"])
    roles = rank_statistics.FEED_FORWARD
    verdicts = [
        FEED_FORWARD.judge(
            rank_statistics.role_share(adapted, found, roles), rank_statistics.role_share(adapted, lots, roles)
        ),
        TOP.judge(rank_statistics.top_share(adapted, found), rank_statistics.top_share(adapted, lots)),
        STABLE.judge(
            rank_statistics.agreement_with_next(adapted, found), rank_statistics.agreement_with_next(adapted, lots)
        ),
        BETTER.judge(rank_statistics.accuracy(adapted), rank_statistics.accuracy(uniform)),
    ]
    exhibits = [
        exhibit("rank_allocation", plots.rank_allocation({ADAPTED: adapted}, chance=True)),
        exhibit("rank_replay", plots.rank_replay(adapted[0])),
        exhibit("importance", plots.importance(adapted[0])),
        exhibit("training_curves", plots.training_curves({ADAPTED: adapted, LOW: uniform})),
    ]
    notes = [
        "Held fixed: model, text, splits, batch size, number of steps. Seeds vary head, adapters, data order, dropout.",
        rank_statistics.NEXT_SEED,
    ]
    return Findings(verdicts, exhibits, notes=notes)


PROBE = register(
    Probe(
        name="adalora",
        title="AdaLoRA: where importance puts the rank",
        source="Zhang et al., AdaLoRA, arXiv 2303.10512",
        question="Do feed-forward matrices and upper layers get more rank, from every seed, and does it help?",
        quick_budget=55,
        arms=arms,
        judge=judge,
    )
)
