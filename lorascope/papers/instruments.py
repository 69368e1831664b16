"""Questions about the instruments, judged by the rules of the second edition, with effects from trained seeds.

A seed trains students of a planted teacher, and price and forks measure them. The claims are registered in
``data/instruments/registered.toml``, separate from those of the papers. A positive effect favors the claim.

==========================  ==========================================================================================
claim                       effect of a seed
==========================  ==========================================================================================
instruments.retrained       cut price minus the price after retraining at the same rate
instruments.forks           log2 of the spread of independent seeds over that of forks, minus 1
instruments.placement       loss of a uniform rank minus that of placed ranks, both retrained
==========================  ==========================================================================================
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from lorascope.papers.judging.study_statistics import Comparison, OfTable

TEACHER = "LoRA, rank 4, text of a teacher"
"""Arm: students of a planted teacher whose modules need different ranks."""
FORK_STEP, LATE_STEP = 100, 175


def student_loss(students: pd.DataFrame, name: str, best: bool = False) -> float:
    """Return the task loss of a student in nats: at the first of its learning rates, or at its best one.

    ``students`` has ``student, lr, loss``, with increasing learning rates.
    """
    losses = students.loc[students["student"] == name, "loss"]
    return float(losses.min() if best else losses.iloc[0])


def halvings(forks: pd.DataFrame, step: int) -> float:
    """Return how many times the spread of fork effects can be doubled to reach that of independent seeds, minus 1.

    ``forks`` has ``step, loss_trunk, loss_fork`` (nats), with a row per training seed and step of the fork. The spread
    of independent seeds is the standard deviation of the difference of a fork and the trunk of another seed.
    """
    of_step = forks[forks["step"] == step]
    trunk, fork = of_step["loss_trunk"].to_numpy(), of_step["loss_fork"].to_numpy()
    independent, paired = fork.var(ddof=1) + trunk.var(ddof=1), (fork - trunk).var(ddof=1)
    return float(np.log2(independent / paired)) / 2 - 1


_CUT = OfTable(partial(student_loss, name="cut to rank 2"), "students", TEACHER)
_RETRAINED = OfTable(partial(student_loss, name="rank 2"), "students", TEACHER)
_SHORT = OfTable(partial(student_loss, name="rank 2, a quarter of the steps"), "students", TEACHER)
_UNIFORM = OfTable(partial(student_loss, name="rank 2", best=True), "students", TEACHER)
_PLACED = OfTable(partial(student_loss, name="placed ranks", best=True), "students", TEACHER)
_PLANTED = OfTable(partial(student_loss, name="planted ranks"), "students", TEACHER)
_FORKS = OfTable(partial(halvings, step=FORK_STEP), "forks", TEACHER)
_LATE_FORKS = OfTable(partial(halvings, step=LATE_STEP), "forks", TEACHER)

QUESTIONS = {
    "instruments.retrained": Comparison(_CUT - _RETRAINED, positive=_CUT - _SHORT),
    "instruments.forks": Comparison(_FORKS, positive=_LATE_FORKS),
    "instruments.placement": Comparison(_UNIFORM - _PLACED, positive=_UNIFORM - _PLANTED),
}
"""Comparison of every claim, by id; the registry of the papers does not have them."""
