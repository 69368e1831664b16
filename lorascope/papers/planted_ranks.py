"""Planted ranks: recovery of known ranks by the allocators AdaLoRA, AutoLoRA and ALoRA.

Do allocators find the ranks that a teacher needs, and learn it better with them? Students learn from a teacher whose
update has a known rank in every module (see ``planted_teacher``). Each allocator is compared with uniform ranks of the
same budget.

Departs:

- No paper has this experiment.
- AutoLoRA has no budget: its thresholds determine the total rank. Its retraining phase is judged.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from lorascope.analysis.planted_ranks import mean_rank_error, rank_correlation, recovered_ranks
from lorascope.papers.judging.statistics import Constant, LogLikelihood, MeanOverRows, OfRun
from lorascope.papers.probe import Arm, Probe, encoder_settings
from lorascope.runs.run import Run

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.methods.method import Method

ALLOCATORS = {"adalora": "AdaLoRA, planted", "autolora": "AutoLoRA, planted", "alora": "ALoRA, planted"}
ADALORA, AUTOLORA, ALORA = ALLOCATORS.values()
UNIFORM = "LoRA, uniform ranks"
RECOVERY = "recovery"
"""Kept table ``module, planted, found``: rank of the teacher's update, and rank that the student ends with."""

UNIFORM_DISTANCE = 1.5
"""Mean distance of rank 2 from the planted ranks 0, 1, 3 and 4, each in a quarter of the modules."""

_SCALE = 4.0


def arms() -> list[Arm]:
    """Return the registered arms on planted ranks: three allocators and LoRA of uniform ranks, on a teacher's text."""
    from lorascope.methods import AdaLoRA, ALoRA, AutoLoRA, LoRA
    from lorascope.papers.setups import planted_teacher

    # AdaLoRA and AutoLoRA only remove components, so they start with the largest planted rank.
    rank, start = planted_teacher.BUDGET, max(planted_teacher.RANKS)
    everywhere: dict[str, Any] = {"targets": "all-linear", "lr": 1e-2, "head_lr": 1e-2}
    # With these alphas, components have about the same initial scale in all methods: AutoLoRA multiplies them by 1/k,
    # and AdaLoRA's P starts small.
    methods: dict[str, Method] = {
        UNIFORM: LoRA(rank=rank, alpha=_SCALE * rank, **everywhere),
        ADALORA: AdaLoRA(init_rank=start, target_rank=rank, alpha=4 * _SCALE * start, **everywhere),
        AUTOLORA: AutoLoRA(rank=start, alpha=_SCALE * start, selection_lr=1e-2, **everywhere),
        ALORA: ALoRA(init_rank=rank, alpha=_SCALE * rank, **everywhere),
    }
    settings = encoder_settings(400) | {"eval_size": 300}
    return [
        Arm(label=label, method=method, settings=settings, model=planted_teacher.student, vary=_with_teacher)
        for label, method in methods.items()
    ]


def _with_teacher(arm: Arm, seed: int) -> Arm:
    """Return the arm on the text of the seed's teacher, with an observer that records the planted ranks."""
    from lorascope.papers.setups import planted_teacher

    # The planted ranks differ by seed, so the arm cannot have the observer itself.
    observers = [*arm.settings["observe"], planted_teacher.planted(ranks=planted_teacher.planted_ranks(seed))]
    return replace(arm, task=planted_teacher.task(seed), settings={**arm.settings, "observe": observers})


def log_likelihood(arm: str) -> MeanOverRows:
    """Return minus the test loss, for a claim on planted ranks."""
    return MeanOverRows(LogLikelihood(arm))


CLAIMS = {
    "planted.adalora_correlation": (OfRun(rank_correlation, RECOVERY, ADALORA), Constant(0.0)),
    "planted.adalora_distance": (-OfRun(mean_rank_error, RECOVERY, ADALORA), -Constant(UNIFORM_DISTANCE)),
    "planted.adalora_loss": (log_likelihood(ADALORA), log_likelihood(UNIFORM)),
    "planted.autolora_correlation": (OfRun(rank_correlation, RECOVERY, AUTOLORA), Constant(0.0)),
    "planted.autolora_distance": (-OfRun(mean_rank_error, RECOVERY, AUTOLORA), -Constant(UNIFORM_DISTANCE)),
    "planted.autolora_loss": (log_likelihood(AUTOLORA), log_likelihood(UNIFORM)),
    "planted.alora_correlation": (OfRun(rank_correlation, RECOVERY, ALORA), Constant(0.0)),
    "planted.alora_distance": (-OfRun(mean_rank_error, RECOVERY, ALORA), -Constant(UNIFORM_DISTANCE)),
    "planted.alora_loss": (log_likelihood(ALORA), log_likelihood(UNIFORM)),
}


def keep_recovery(run: Run) -> pd.DataFrame:
    """Return the kept table ``recovery`` of planted ranks; see ``RECOVERY``."""
    ranks = recovered_ranks(run)[["module", "planted", "found"]]
    return ranks.astype({"planted": "int16", "found": "int16"}).reset_index(drop=True)


PROBE = Probe(
    name="planted",
    title="Planted ranks: recovery of known ranks by allocators",
    source="this project",
    question="Do allocators recover the rank of each module if it is known, and does this lower the test loss?",
    arms=arms,
    keep={(RECOVERY, label): keep_recovery for label in ALLOCATORS.values()},
)
