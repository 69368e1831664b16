"""Probe of AdaLoRA: rank allocated to feed-forward modules and upper layers, agreement of seeds, and accuracy.

Source: AdaLoRA (arXiv 2303.10512), figure 3 and section 4.4 (rank allocation), table 1 (accuracy).

Departs:

- A small encoder instead of DeBERTaV3-base, and hundreds of training steps.

The authors' parameter counts allow less rank in feed-forward modules than the text of the paper states. The claim may
therefore fail in the paper's setting as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lorascope import plots
from lorascope.charts.chart import Chart
from lorascope.evidence.statistics import adalora as statistics
from lorascope.evidence.statistics.lora import LOW
from lorascope.evidence.statistics.ranks import RANKS
from lorascope.methods import AdaLoRA
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.plots.builders import add_printed
from lorascope.probes.base import Arm, EvidenceFigure, Probe, encoder_settings, own_labels
from lorascope.probes.kept_ranks import keep_ranks
from lorascope.probes.printed_numbers import printed
from lorascope.runs.run import Run


def arms() -> list[Arm]:
    """Return the registered arms: AdaLoRA on sentiment and on its domains, and with rank 8 everywhere throughout."""
    adapted = AdaLoRA(init_rank=12, target_rank=8)
    # The scale is alpha / init_rank, the same for both.
    uniform = replace(adapted, init_rank=8, alpha=adapted.alpha * 8 / 12)
    settings = encoder_settings()
    return [
        Arm(label=statistics.ADAPTED, method=adapted, settings=settings),
        Arm(label=statistics.DOMAINS, method=adapted, settings=settings, task="sentiment/domains"),
        Arm(label=statistics.UNIFORM, method=uniform, settings=settings),
    ]


def figures(runs: Mapping[str, Run]) -> list[ReportFigure]:
    """Draw the allocation and its history."""
    run = {statistics.ADAPTED: runs[statistics.ADAPTED]}
    return [draw("rank_allocation", run, chance=True), draw("rank_replay", run), draw("importance", run)]


def _draw_accuracy(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="AdaLoRA", table="Table 1", data="SST-2")
    numbers = numbers.assign(recipe=numbers["method"].map({"AdaLoRA, budget 576": "AdaLoRA", LOW: LOW}))
    numbers = numbers.dropna(subset="recipe").assign(source="printed")
    chart = replace(plots.ablations(runs, start=0.5), title="AdaLoRA compared with uniform ranks")
    return add_printed(chart, numbers, "recipe", "AdaLoRA, table 1, SST-2")


def evidence_figures() -> list[EvidenceFigure]:
    """Return the figures of the allocation, its history and its accuracy."""
    adapted = own_labels(statistics.ADAPTED)
    return [
        EvidenceFigure(
            name="rank-allocation",
            alt="Final ranks of AdaLoRA by layer and role, and a random allocation of the same budget",
            arms=adapted,
            draw=partial(plots.rank_allocation, chance=True),
        ),
        EvidenceFigure(
            name="rank-domains",
            alt="Final ranks of AdaLoRA on sentiment and on its domains",
            arms={"sentiment": statistics.ADAPTED, "domains": statistics.DOMAINS},
            draw=plots.rank_allocation,
        ),
        EvidenceFigure(
            name="rank-replay",
            alt="Ranks of AdaLoRA over the steps, next to the budget",
            arms=adapted,
            draw=plots.rank_replay,
            seeds=1,
        ),
        EvidenceFigure(
            name="importance",
            alt="Importance of retained and dropped components over the steps",
            arms=adapted,
            draw=plots.importance,
        ),
        EvidenceFigure(
            name="accuracy-adalora",
            alt="Accuracy of AdaLoRA, of its parametrization with uniform ranks, of LoRA, and printed numbers",
            arms={"AdaLoRA": statistics.ADAPTED, "AdaLoRA, uniform ranks": statistics.UNIFORM, LOW: LOW},
            draw=_draw_accuracy,
            seeds=None,
            scores_only=True,
        ),
    ]


PROBE = Probe(
    name="adalora",
    title="AdaLoRA: rank allocation by importance",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512",
    question="Do feed-forward modules and upper layers get more rank for every seed, and does accuracy improve?",
    arms=arms,
    keep={(RANKS, label): keep_ranks for label in (statistics.ADAPTED, statistics.DOMAINS)},
    figures=figures,
    evidence_figures=evidence_figures,
)
