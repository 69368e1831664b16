"""Probe with planted ranks: recovery of known ranks by the allocators AdaLoRA, AutoLoRA and ALoRA.

Students learn from a teacher whose update has a known rank in every module (see ``planted_teacher``). Each allocator is
compared with uniform and with random ranks of the same budget. LoRA with the planted ranks shows the benefit of knowing
the truth.

Departs:

- No paper has this experiment.
- AutoLoRA has no budget: its thresholds determine the total rank. Its retraining phase is judged.
- All learning rates are equal, and none was tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from lorascope import observe
from lorascope.analysis import baseline_ranks
from lorascope.analysis.planted_ranks import absolute_error, rank_correlation, recovered_ranks
from lorascope.evidence.statistics import planted as statistics
from lorascope.methods import AdaLoRA, ALoRA, AutoLoRA, LoRA
from lorascope.probes import planted_teacher
from lorascope.probes.base import Arm, Probe, draw, over_seeds, registered_settings, select, tabulate
from lorascope.probes.seed_statistics import EachRun, loss
from lorascope.runs.run import Run

UNIFORM, RANDOM, TRUTH = "LoRA, uniform ranks", "LoRA, random ranks", "LoRA, the planted ranks"
ALLOCATORS = {"AdaLoRA": "AdaLoRA, planted", "AutoLoRA": "AutoLoRA, planted", "ALoRA": "ALoRA, planted"}
_SCALE = 4.0
_RATES: dict[str, Any] = {"lr": 1e-2, "head_lr": 1e-2}


def arms(quick: bool) -> list[Arm]:
    """Return the arms: three allocators, uniform and random ranks, and the planted ranks."""
    settings = {"steps": 60 if quick else 400, "batch_size": 16, "eval_every": 0, "eval_size": 300, "test_size": 600}
    observed: dict[str, Any] = settings | {"observe": [observe.norms(every=100)]}
    make = partial(Arm, settings=observed, model=planted_teacher.student)
    rank, start = planted_teacher.BUDGET, max(planted_teacher.RANKS)
    everywhere: dict[str, Any] = {"targets": "all-linear", **_RATES}
    # With these alphas, components have about the same initial scale in all methods: AutoLoRA multiplies them by 1/k,
    # and AdaLoRA's P starts small.
    ada = AdaLoRA(init_rank=start, target_rank=rank, alpha=4 * _SCALE * start, **everywhere)
    auto = AutoLoRA(rank=start, alpha=_SCALE * start, selection_lr=1e-2, **everywhere)
    alo = ALoRA(init_rank=rank, alpha=_SCALE * rank, **everywhere)
    return [
        make(label=UNIFORM, method=_lora(rank), cost=0.02, vary=_seeded_arm),
        make(
            label=RANDOM,
            method=_lora(rank),
            cost=0.02,
            vary=lambda arm, seed: _seeded_arm(arm, seed, random_ranks(seed)),
        ),
        make(
            label=TRUTH,
            method=_lora(rank),
            cost=0.02,
            vary=lambda arm, seed: _seeded_arm(arm, seed, planted_teacher.planted_ranks(seed)),
        ),
        make(label=ALLOCATORS["AdaLoRA"], method=ada, cost=0.025, vary=_seeded_arm),
        make(label=ALLOCATORS["AutoLoRA"], method=auto, cost=0.15, vary=_seeded_arm),
        make(label=ALLOCATORS["ALoRA"], method=alo, cost=0.05, vary=_seeded_arm),
    ]


def registered() -> list[Arm]:
    """Return the registered arms: three allocators, and LoRA with uniform ranks, on the text of the seed's teacher."""
    labels = {*ALLOCATORS.values(), UNIFORM}
    settings = registered_settings(400) | {"eval_size": 300}
    return [replace(arm, settings=settings) for arm in arms(quick=False) if arm.label in labels]


def _lora(rank: int | Mapping[str, int]) -> LoRA:
    return LoRA(rank=rank, alpha=_SCALE * planted_teacher.BUDGET, targets="all-linear", **_RATES)


def random_ranks(seed: int) -> dict[str, int]:
    """Draw random ranks for the same modules with the same total; no rank exceeds the largest planted one."""
    truth = planted_teacher.planted_ranks(seed)
    return baseline_ranks.random(list(truth), sum(truth.values()), seed, cap=max(planted_teacher.RANKS))


def _seeded_arm(arm: Arm, seed: int, ranks: Mapping[str, int] | None = None) -> Arm:
    """Return the arm on the text of the seed's teacher, with an observer that records the planted ranks."""
    arm = arm if ranks is None else replace(arm, method=_lora(ranks))
    truth = planted_teacher.planted(ranks=planted_teacher.planted_ranks(seed))
    return replace(
        arm, task=planted_teacher.task(seed), settings={**arm.settings, "observe": [*arm.settings["observe"], truth]}
    )


def keep_recovery(run: Run) -> pd.DataFrame:
    """Return the kept table ``recovery``; see ``evidence.statistics.planted``."""
    found = recovered_ranks(run)[["module", "planted", "found"]]
    return found.astype({"planted": "int16", "found": "int16"}).reset_index(drop=True)


_STATISTICS = {
    "correlation": lambda arm: (EachRun(rank_correlation, arm), EachRun(rank_correlation, RANDOM)),
    "distance": lambda arm: (-EachRun(absolute_error, arm), -EachRun(absolute_error, UNIFORM)),
    "loss": lambda arm: (-EachRun(loss, arm), -EachRun(loss, UNIFORM)),
}
_COLUMNS = {
    "rank correlation": over_seeds(rank_correlation, 2),
    "|found - planted|": over_seeds(absolute_error, 2),
    "total rank": over_seeds(lambda run: sum(run.ranks().values()), 2),
    "test loss (nats)": over_seeds(loss, 2),
}

PROBE = Probe(
    name="planted",
    title="Planted ranks: recovery of known ranks by allocators",
    source="this project",
    question="Do allocators recover the rank of each module if it is known, and does this lower the test loss?",
    quick_budget=40,
    arms=arms,
    registered=registered,
    keep={(statistics.RECOVERY, label): keep_recovery for label in ALLOCATORS.values()},
    claims={
        f"planted.{name.lower()}_{quantity}": compare(arm)
        for name, arm in ALLOCATORS.items()
        for quantity, compare in _STATISTICS.items()
    },
    figures=lambda runs: [draw("planted", select(runs, *ALLOCATORS.values(), RANDOM))],
    tables=lambda runs: {"Recovery of the planted ranks": tabulate(runs, _COLUMNS)},
    notes=lambda runs: [
        "Held fixed: base model, number of examples, learning rates, batch size, steps. Seeds vary the planted ranks, "
        "the teacher, its text, adapter initialization and data order.",
        "All planted components have the same singular value relative to the base weight. Modules differ only in the "
        "number of components.",
    ],
    seeds=5,
)
