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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope import observe, plots
from lorascope.analysis import baseline_ranks
from lorascope.analysis.planted_ranks import absolute_error, rank_correlation
from lorascope.analysis.seed_intervals import t_interval
from lorascope.methods import AdaLoRA, ALoRA, AutoLoRA, LoRA
from lorascope.probes import planted_teacher
from lorascope.probes.base import Arm, Findings, Probe, make_report_figure, register
from lorascope.probes.claims import Claim, Verdict
from lorascope.runs.run import Run

UNIFORM, RANDOM, TRUTH = "LoRA, uniform ranks", "LoRA, random ranks", "LoRA, the planted ranks"
ALLOCATORS = {"AdaLoRA": "AdaLoRA, planted", "AutoLoRA": "AutoLoRA, planted", "ALoRA": "ALoRA, planted"}
_SCALE = 4.0
_RATES: dict[str, Any] = {"lr": 1e-2, "head_lr": 1e-2}


def _allocator_claims(name: str) -> tuple[Claim, Claim, Claim]:
    source = "this project; assumed by the paper"
    return (
        Claim(
            sentence=f"{name} gives more rank to modules with a higher planted rank.",
            statistic="Spearman correlation of found and planted ranks over modules",
            control="the same for random ranks with the same budget",
            margin=0.2,
            source=source,
        ),
        Claim(
            sentence=f"{name}'s ranks are closer to the planted ranks than uniform ranks are.",
            statistic="minus the mean of |found - planted| over modules",
            control="the same for uniform ranks",
            margin=0.1,
            source=source,
        ),
        Claim(
            sentence=f"Students trained by {name} reach a lower test loss than students with uniform ranks.",
            statistic="minus the test loss (nats)",
            control="the same for LoRA with uniform ranks, after the same number of steps",
            margin=0.01,
            source=source,
        ),
    )


CLAIMS = {name: _allocator_claims(name) for name in ALLOCATORS}


def arms(quick: bool) -> list[Arm]:
    """Return the arms: three allocators, uniform and random ranks, and the planted ranks."""
    settings = {"steps": 60 if quick else 400, "batch_size": 16, "eval_every": 0, "eval_size": 300, "test_size": 600}
    shared: dict[str, Any] = {
        "settings": settings | {"observe": [observe.norms(every=100)]},
        "model": planted_teacher.student,
    }
    rank, start = planted_teacher.BUDGET, max(planted_teacher.RANKS)
    everywhere: dict[str, Any] = {"targets": "all-linear", **_RATES}
    lora = _lora(rank)
    # With these alphas, components have about the same initial scale in all methods: AutoLoRA multiplies them by 1/k,
    # and AdaLoRA's P starts small.
    return [
        Arm(label=UNIFORM, method=lora, cost=0.02, vary=_seeded_arm, **shared),
        Arm(label=RANDOM, method=lora, cost=0.02, vary=_random_arm, **shared),
        Arm(label=TRUTH, method=lora, cost=0.02, vary=_true_arm, **shared),
        Arm(
            label=ALLOCATORS["AdaLoRA"],
            method=AdaLoRA(init_rank=start, target_rank=rank, alpha=4 * _SCALE * start, **everywhere),
            cost=0.025,
            vary=_seeded_arm,
            **shared,
        ),
        Arm(
            label=ALLOCATORS["AutoLoRA"],
            method=AutoLoRA(rank=start, alpha=_SCALE * start, selection_lr=1e-2, **everywhere),
            cost=0.15,
            vary=_seeded_arm,
            **shared,
        ),
        Arm(
            label=ALLOCATORS["ALoRA"],
            method=ALoRA(init_rank=rank, alpha=_SCALE * rank, **everywhere),
            cost=0.05,
            vary=_seeded_arm,
            **shared,
        ),
    ]


def _lora(rank: int | Mapping[str, int]) -> LoRA:
    return LoRA(rank=rank, alpha=_SCALE * planted_teacher.BUDGET, targets="all-linear", **_RATES)


def random_ranks(seed: int) -> dict[str, int]:
    """Draw random ranks for the same modules with the same total; no rank exceeds the largest planted one."""
    truth = planted_teacher.planted_ranks(seed)
    return baseline_ranks.random(list(truth), sum(truth.values()), seed, cap=max(planted_teacher.RANKS))


def _seeded_arm(arm: Arm, seed: int) -> Arm:
    """Return the arm on the text of the seed's teacher, with an observer that records the planted ranks."""
    truth = planted_teacher.planted(ranks=planted_teacher.planted_ranks(seed))
    return replace(
        arm, task=planted_teacher.task(seed), settings={**arm.settings, "observe": [*arm.settings["observe"], truth]}
    )


def _random_arm(arm: Arm, seed: int) -> Arm:
    return _seeded_arm(replace(arm, method=_lora(random_ranks(seed))), seed)


def _true_arm(arm: Arm, seed: int) -> Arm:
    return _seeded_arm(replace(arm, method=_lora(planted_teacher.planted_ranks(seed))), seed)


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Judge correlation and error of the found ranks relative to the planted ranks, and the test loss."""

    def by_seed(label: str, measure: Callable[[Run], float]) -> dict[int, float]:
        return {run.seed: measure(run) for run in runs[label]}

    verdicts: list[Verdict] = []
    for name, label in ALLOCATORS.items():
        for claim, measure, control in zip(
            CLAIMS[name],
            (rank_correlation, lambda run: -absolute_error(run), lambda run: -run.score.loss),
            (RANDOM, UNIFORM, UNIFORM),
            strict=True,
        ):
            verdicts.append(claim.judge(by_seed(label, measure), by_seed(control, measure)))
    shown = {label: runs[label] for label in (*ALLOCATORS.values(), RANDOM)}
    notes = [
        "Held fixed: base model, number of examples, learning rates, batch size, steps. Seeds vary the planted ranks, "
        "the teacher, its text, adapter initialization and data order.",
        "All planted components have the same singular value relative to the base weight. Modules differ only in the "
        "number of components.",
    ]
    return Findings(
        verdicts,
        [make_report_figure("planted", plots.planted(shown))],
        {"Recovery of the planted ranks": table(runs)},
        notes,
    )


def table(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Tabulate rank correlation, absolute error, total rank and test loss by arm: mean ± half the 95% t-interval."""
    columns: dict[str, Callable[[Run], float]] = {
        "rank correlation": rank_correlation,
        "|found - planted|": absolute_error,
        "total rank": lambda run: float(sum(run.ranks().values())),
        "test loss (nats)": lambda run: run.score.loss,
    }
    return pd.DataFrame(
        [
            {"": label}
            | {
                name: t_interval(np.array([measure(run) for run in found])).format(2)
                for name, measure in columns.items()
            }
            for label, found in runs.items()
        ]
    )


PROBE = register(
    Probe(
        name="planted",
        title="Planted ranks: recovery of known ranks by allocators",
        source="this project",
        question="Do allocators recover the rank of each module if it is known, and does this lower the test loss?",
        quick_budget=40,
        arms=arms,
        judge=judge,
        seeds=5,
    )
)
