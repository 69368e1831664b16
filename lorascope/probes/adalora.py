"""Probe of AdaLoRA: rank allocated to feed-forward modules and upper layers, agreement of seeds, and accuracy.

Source: AdaLoRA (arXiv 2303.10512), figure 3 and section 4.4 (rank allocation), table 1 (accuracy).

Departs:

- A small encoder instead of DeBERTaV3-base, and hundreds of training steps.

The authors' parameter counts allow less rank in feed-forward modules than the text of the paper states. The claim may
therefore fail in the paper's setting as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorascope import plots
from lorascope.analysis import rank_allocations
from lorascope.methods import AdaLoRA
from lorascope.probes import rank_statistics
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, make_report_figure, register
from lorascope.probes.claims import Claim
from lorascope.probes.lora import LOW
from lorascope.probes.lora import arms as lora_arms
from lorascope.runs.run import Run

ADAPTED = "AdaLoRA, from rank 12 to 8"
_RANDOM = "the same for random ranks with the same total"

FEED_FORWARD = Claim(
    sentence="AdaLoRA allocates more rank to feed-forward modules than random allocation does.",
    statistic="fraction of the final total rank in feed-forward modules",
    control=_RANDOM,
    margin=0.02,
    source="section 4.4, figure 3",
)
TOP = Claim(
    sentence="AdaLoRA allocates more rank to the upper layers than random allocation does.",
    statistic="fraction of the final total rank in the top third of the layers",
    control=_RANDOM,
    margin=0.02,
    source="section 4.4, figure 3",
)
STABLE = Claim(
    sentence="AdaLoRA's ranks agree between seeds more than random ranks do.",
    statistic="Kendall's tau between the final ranks of one seed and the next",
    control=_RANDOM,
    margin=0.1,
    source="section 4.4",
)
BETTER = Claim(
    sentence="AdaLoRA outperforms LoRA with uniform ranks and the same total rank.",
    statistic="test accuracy of AdaLoRA with a mean final rank of 8",
    control="test accuracy of LoRA, rank 8, after the same number of steps",
    margin=0.002,
    source="table 1",
)


def arms(quick: bool) -> list[Arm]:
    """Return the arms: AdaLoRA on all linear layers, and LoRA with AdaLoRA's mean final rank."""
    method = AdaLoRA(init_rank=12, target_rank=8)
    uniform = next(arm for arm in lora_arms(quick) if arm.label == LOW)
    return [uniform, Arm(label=ADAPTED, method=method, settings=encoder_settings(quick), cost=1.1)]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Compare the ranks with random ranks (fractions, agreement), and the accuracy with uniform ranks."""
    adapted, uniform = runs[ADAPTED], runs[LOW]
    found = rank_statistics.final_ranks(adapted)
    # AdaLoRA never exceeds its initial rank, so the random ranks have the same cap.
    drawn = rank_allocations.random_ranks(found, cap=adapted[0].meta.method["init_rank"])
    roles = rank_statistics.FEED_FORWARD
    verdicts = [
        FEED_FORWARD.judge(
            rank_statistics.role_share(adapted, found, roles), rank_statistics.role_share(adapted, drawn, roles)
        ),
        TOP.judge(rank_statistics.top_share(adapted, found), rank_statistics.top_share(adapted, drawn)),
        STABLE.judge(
            rank_statistics.agreement_with_next(adapted, found), rank_statistics.agreement_with_next(adapted, drawn)
        ),
        BETTER.judge(rank_statistics.accuracy(adapted), rank_statistics.accuracy(uniform)),
    ]
    figures = [
        make_report_figure("rank_allocation", plots.rank_allocation({ADAPTED: adapted}, chance=True)),
        make_report_figure("rank_replay", plots.rank_replay(adapted[0])),
        make_report_figure("importance", plots.importance(adapted[0])),
        make_report_figure("training_curves", plots.training_curves({ADAPTED: adapted, LOW: uniform})),
    ]
    notes = [
        "Held fixed: model, data, splits, batch size, number of steps. Seeds vary the classifier head, adapter "
        "initialization, data order and dropout.",
        rank_statistics.NEXT_SEED,
    ]
    return Findings(verdicts, figures, notes=notes)


PROBE = register(
    Probe(
        name="adalora",
        title="AdaLoRA: rank allocation by importance",
        source="Zhang et al., AdaLoRA, arXiv 2303.10512",
        question="Do feed-forward modules and upper layers get more rank for every seed, and does accuracy improve?",
        quick_budget=55,
        arms=arms,
        judge=judge,
    )
)
