"""The ten runs of ``lorascope reproduce``: every method and full fine-tuning once, on sentiment, with few steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope import observe
from lorascope.experiments.sweep import Job, run_jobs
from lorascope.inputs import tasks
from lorascope.inputs.task_parts import first_test_rows
from lorascope.papers import adalora, adapprox, alora, autolora, fourierft, hydralora, lisa, lora, neft
from lorascope.papers.judging.learning_rates import choice_of_arm
from lorascope.papers.judging.registration import Registration
from lorascope.papers.probe import Arm, encoder_settings
from lorascope.papers.training.train_arms import registered_arms
from lorascope.runs.run import Run
from lorascope.runs.writer import remove_states

EVALUATED, TEST_ROWS, LENGTH = 64, 800, 28
"""Rows of the validation split at each evaluation, rows of the test split, and tokens of a text.

Almost two thirds of the texts are not longer.
"""


@dataclass(frozen=True)
class Short:
    """Shortened form of a registered arm, for a short run.

    Parameters
    ----------
    lr, head_lr : float
        Smallest rates, at which so few steps learn the task; used unless the kept tuning runs choose larger ones.
    largest : bool
        Whether they are the largest rates as well, at which every seed learns the task.
    steps : int
        Number of steps.
    cost : float
        Expected CPU-seconds of the run.
    changes : mapping
        Fields of the method with other values.
    observers : tuple of Observer
        Further observers, in addition to the norms.
    """

    lr: float
    head_lr: float
    steps: int
    cost: float
    largest: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    observers: tuple[observe.Observer, ...] = ()


ARMS = {
    lora.FULL: Short(1e-4, 1e-4, 80, 60, observers=(observe.second_moments(every=80),)),
    lora.LOW: Short(1e-3, 1e-3, 90, 40),
    # At its middle rate, 3e-3, AdaLoRA hardly leaves chance level in these steps.
    adalora.ADAPTED: Short(1e-2, 1e-3, 90, 45),
    autolora.ADAPTED: Short(1e-3, 1e-3, 105, 60, changes={"search_steps": 8}),
    # At its tuned rate, 3e-3, some seeds return to chance level.
    alora.ADAPTED: Short(1e-3, 1e-3, 112, 84, largest=True, changes={"rounds": 2, "score_rows": 8}),
    # At its middle rate, 1e-3, some seeds stay below an accuracy of 0.75.
    hydralora.ROUTED: Short(3e-3, 3e-3, 110, 55),
    # At its middle rate, 5e-2, or in 95 steps, some seeds stay below an accuracy of 0.75.
    fourierft.DEFAULT: Short(1.5e-1, 1.5e-2, 130, 52),
    # Each block trains only in some of these steps.
    lisa.DRAWN: Short(3e-4, 3e-4, 95, 45),
    neft.CHANGED: Short(3e-4, 3e-4, 75, 65, changes={"tune_steps": 25}, observers=(observe.utilization(every=75),)),
    adapprox.OURS: Short(1e-4, 1e-4, 66, 85, observers=(observe.factor_drift(every=33),)),
}
"""Registered arm -> its shortened form, in the order of the tables."""


def shorten(label: str, short: Short, seed: int, claims: Registration | None, runs: pd.DataFrame) -> Arm:
    """Return a registered arm as a short run trains it.

    Parameters
    ----------
    label : str
        Label of the arm.
    short : Short
        Its shortened form.
    seed : int
        Seed of the run.
    claims : Registration or None
        Registration, and ``runs.csv`` of the evidence, which choose the learning rate.
    runs : DataFrame
        See ``claims``.
    """
    arm: Any = registered_arms()[label]
    rates = {"lr": short.lr, "head_lr": short.head_lr}
    if claims is not None and not short.largest:
        tuned_rate = choice_of_arm(claims, runs, label)[1].rate or 0
        if tuned_rate > short.lr:
            rates = claims.arms[label].fields_at(tuned_rate)
    method = replace(arm.of_seed(seed).method, **rates, **short.changes)
    settings = encoder_settings(short.steps, *short.observers)
    settings |= {"seed": seed, "eval_every": short.steps // 4, "eval_size": EVALUATED, "max_length": LENGTH}
    return replace(arm, method=method, settings=settings, task="sentiment", vary=None)


def has_task_of_kept_runs(label: str) -> bool:
    """Return whether the kept runs of an arm have the task of the short runs, so that values are comparable."""
    arm: Any = registered_arms()[label]
    return bool(arm.task == "sentiment")


def train_short_runs(root: Path, seed: int, claims: Registration | None, runs: pd.DataFrame) -> dict[str, Run]:
    """Train the ten short runs and return them by label. Finished runs in the folder are reused.

    Saved copies of the whole model are removed.

    Raises
    ------
    RunsFailed
        A run failed; the others are saved.
    """
    arms = {label: shorten(label, short, seed, claims, runs) for label, short in ARMS.items()}
    task = first_test_rows(tasks.load("sentiment"), TEST_ROWS)
    # The longest first, so that both processes end at about the same time.
    order = sorted(arms, key=lambda label: -ARMS[label].cost)
    jobs = []
    for label in order:
        arm, settings = arms[label], {**arms[label].settings, "root": root}
        jobs.append(Job(arm.model, task, arm.method, settings, label, ARMS[label].cost))
    trained = dict(zip(order, run_jobs(jobs, ended=_remove_copy).all_runs(), strict=True))
    return {label: trained[label] for label in ARMS}


def _remove_copy(run: Run) -> None:
    """Delete the saved parameters of a run without adapters, which are a copy of the model."""
    if not run.ranks():
        remove_states(run)
