"""Probe with planted ranks: recovery of known ranks by the allocators AdaLoRA, AutoLoRA and ALoRA.

Students learn from a teacher whose update has a known rank in every module (see ``planted_teacher``). Each allocator is
compared with uniform ranks of the same budget.

Departs:

- No paper has this experiment.
- AutoLoRA has no budget: its thresholds determine the total rank. Its retraining phase is judged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope.analysis.planted_ranks import recovered_ranks
from lorascope.evidence.statistics.planted import ADALORA, ALLOCATORS, ALORA, AUTOLORA, RECOVERY, UNIFORM
from lorascope.methods import AdaLoRA, ALoRA, AutoLoRA, LoRA
from lorascope.methods.base import Method
from lorascope.probes import planted_teacher
from lorascope.probes.base import Arm, Probe, encoder_settings
from lorascope.runs.run import Run

_SCALE = 4.0


def arms() -> list[Arm]:
    """Return the registered arms: three allocators, and LoRA with uniform ranks, on the text of the seed's teacher."""
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
    truth = planted_teacher.planted(ranks=planted_teacher.planted_ranks(seed))
    return replace(
        arm, task=planted_teacher.task(seed), settings={**arm.settings, "observe": [*arm.settings["observe"], truth]}
    )


def keep_recovery(run: Run) -> pd.DataFrame:
    """Return the kept table ``recovery``; see ``evidence.statistics.planted``."""
    found = recovered_ranks(run)[["module", "planted", "found"]]
    return found.astype({"planted": "int16", "found": "int16"}).reset_index(drop=True)


PROBE = Probe(
    name="planted",
    title="Planted ranks: recovery of known ranks by allocators",
    source="this project",
    question="Do allocators recover the rank of each module if it is known, and does this lower the test loss?",
    arms=arms,
    keep={(RECOVERY, label): keep_recovery for label in ALLOCATORS.values()},
)
