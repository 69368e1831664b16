"""Planted truth: do the allocators give rank to the layers that need it?

Students of a teacher whose update has a known rank in every layer (see ``planted_teacher``), each allocator against the
same budget spread evenly, and against the same budget spread at random. The ranks that were planted are a recipe too:
what knowing the truth is worth.

Departs: no paper has this experiment. AutoLoRA has no budget: it ends where its thresholds put it, and its retrained
phase is judged. Every rate is the same, none was tuned.
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
from lorascope.probes.base import Arm, Findings, Probe, exhibit, register
from lorascope.probes.claims import Claim, Verdict
from lorascope.runs.run import Run

UNIFORM, RANDOM, TRUTH = "LoRA, uniform ranks", "LoRA, random ranks", "LoRA, the planted ranks"
ALLOCATORS = {"AdaLoRA": "AdaLoRA, planted", "AutoLoRA": "AutoLoRA, planted", "ALoRA": "ALoRA, planted"}
_SCALE = 4.0
_RATES: dict[str, Any] = {"lr": 1e-2, "head_lr": 1e-2}


def _allocator_claims(name: str) -> tuple[Claim, Claim, Claim]:
    source = "this project; what the paper takes for granted"
    return (
        Claim(
            sentence=f"{name} gives more rank to the layers that need more.",
            statistic="Spearman correlation over modules of found and planted rank",
            control="that of random ranks of the same budget",
            margin=0.2,
            source=source,
        ),
        Claim(
            sentence=f"{name} comes closer to the ranks needed than the same rank everywhere.",
            statistic="mean of |found - planted| over modules, its sign turned",
            control="that of the same rank everywhere",
            margin=0.1,
            source=source,
        ),
        Claim(
            sentence=f"Students with {name}'s ranks learn the teacher better than with the same rank everywhere.",
            statistic="test loss in nats, its sign turned",
            control="that of the same rank everywhere, at the same steps",
            margin=0.01,
            source=source,
        ),
    )


CLAIMS = {name: _allocator_claims(name) for name in ALLOCATORS}


def arms(quick: bool) -> list[Arm]:
    """Three allocators, two baselines, and the truth."""
    settings = {"steps": 60 if quick else 400, "batch_size": 16, "eval_every": 0, "eval_size": 300, "test_size": 600}
    shared: dict[str, Any] = {
        "settings": settings | {"observe": [observe.norms(every=100)]},
        "model": planted_teacher.student,
    }
    rank, start = planted_teacher.BUDGET, max(planted_teacher.RANKS)
    everywhere: dict[str, Any] = {"targets": "all-linear", **_RATES}
    lora = _lora(rank)
    # What multiplies a component at its start is near the same in all: alpha is 1/k in AutoLoRA, P small in AdaLoRA.
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
    """The budget spread at random over the same modules, no rank above the largest planted one."""
    truth = planted_teacher.planted_ranks(seed)
    return baseline_ranks.random(list(truth), sum(truth.values()), seed, cap=max(planted_teacher.RANKS))


def _seeded_arm(arm: Arm, seed: int) -> Arm:
    """The same recipe on the text of this seed's teacher, with the truth on record."""
    truth = planted_teacher.planted(ranks=planted_teacher.planted_ranks(seed))
    return replace(
        arm, task=planted_teacher.task(seed), settings={**arm.settings, "observe": [*arm.settings["observe"], truth]}
    )


def _random_arm(arm: Arm, seed: int) -> Arm:
    return _seeded_arm(replace(arm, method=_lora(random_ranks(seed))), seed)


def _true_arm(arm: Arm, seed: int) -> Arm:
    return _seeded_arm(replace(arm, method=_lora(planted_teacher.planted_ranks(seed))), seed)


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Correlation and error of the ranks against the planted ones, and the loss they lead to."""

    def by_seed(label: str, measure: Callable[[Run], float]) -> dict[int, float]:
        return {run.meta["seed"]: measure(run) for run in runs[label]}

    verdicts: list[Verdict] = []
    for name, label in ALLOCATORS.items():
        for claim, measure, control in zip(
            CLAIMS[name],
            (rank_correlation, lambda run: -absolute_error(run), lambda run: -run.meta["test"]["loss"]),
            (RANDOM, UNIFORM, UNIFORM),
            strict=True,
        ):
            verdicts.append(claim.judge(by_seed(label, measure), by_seed(control, measure)))
    shown = {label: runs[label] for label in (*ALLOCATORS.values(), RANDOM)}
    notes = [
        "Held fixed: the base, the number of texts, rates, batch size, steps. Seeds vary the planted ranks, the "
        "teacher, its text, adapters, data order.",
        "Components all have the same singular value, so only their number tells how much a layer needs.",
    ]
    return Findings(verdicts, [exhibit("planted", plots.planted(shown))], {"Recovery": table(runs)}, notes)


def table(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Rank correlation, absolute error, total rank and test loss by recipe: mean and half the interval over seeds."""
    columns: dict[str, Callable[[Run], float]] = {
        "rank correlation": rank_correlation,
        "|found - planted|": absolute_error,
        "total rank": lambda run: float(sum(run.ranks().values())),
        "test loss (nats)": lambda run: run.meta["test"]["loss"],
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
        title="Planted truth: do allocators find the ranks that are needed?",
        source="this project",
        question="Where the rank that each layer needs is known, who finds it, and does finding it help?",
        quick_budget=40,
        arms=arms,
        judge=judge,
        seeds=5,
    )
)
