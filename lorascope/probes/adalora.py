"""Probe of AdaLoRA: rank allocated to feed-forward modules and upper layers, agreement of seeds, and accuracy.

Source: AdaLoRA (arXiv 2303.10512), figure 3 and section 4.4 (rank allocation), table 1 (accuracy).

Departs:

- A small encoder instead of DeBERTaV3-base, and hundreds of training steps.

The authors' parameter counts allow less rank in feed-forward modules than the text of the paper states. The claim may
therefore fail in the paper's setting as well.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from lorascope.evidence.statistics import adalora as statistics
from lorascope.evidence.statistics.ranks import RANKS
from lorascope.methods import AdaLoRA
from lorascope.probes.base import Arm, Probe, encoder_settings
from lorascope.probes.rank_allocators import allocation_figures, keep_ranks


def arms() -> list[Arm]:
    """Return the registered arms: AdaLoRA on sentiment and on its domains, and with rank 8 everywhere throughout.

    Smaller budgets, and AdaLoRA without one of its parts, are for figures.
    """
    adapted = AdaLoRA(init_rank=12, target_rank=8)
    # The scale is alpha / init_rank, the same for all.
    uniform = replace(adapted, init_rank=8, alpha=adapted.alpha * 8 / 12)
    settings = encoder_settings()
    return [
        Arm(label=statistics.ADAPTED, method=adapted, settings=settings),
        Arm(label=statistics.DOMAINS, method=adapted, settings=settings, task="sentiment/domains"),
        Arm(label=statistics.UNIFORM, method=uniform, settings=settings),
        Arm(label=statistics.FREE, method=replace(adapted, gamma=0.0), settings=settings),
        Arm(label=statistics.RAW, method=replace(adapted, importance="sensitivity"), settings=settings),
        *(
            Arm(
                label=label,
                method=replace(adapted, init_rank=first, target_rank=last, alpha=adapted.alpha * first / 12),
                settings=settings,
            )
            for (last, label), first in zip(statistics.SMALLER.items(), (2, 4, 6), strict=True)
        ),
    ]


PROBE = Probe(
    name="adalora",
    title="AdaLoRA: rank allocation by importance",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512",
    question="Do feed-forward modules and upper layers get more rank for every seed, and does accuracy improve?",
    arms=arms,
    keep={(RANKS, label): keep_ranks for label in (statistics.ADAPTED, statistics.DOMAINS)},
    figures=partial(allocation_figures, label=statistics.ADAPTED),
)
