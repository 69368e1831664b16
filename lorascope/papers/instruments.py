"""Questions about the instruments, judged by the rules of the second edition, with effects from trained seeds.

A seed trains students of a planted teacher, and price and forks measure them; or an adapter on few sentences, which the
dial measures. The claims are registered in ``data/instruments/registered.toml``, separate from those of the papers. A
positive effect favors the claim.

==========================  ==========================================================================================
claim                       effect of a seed
==========================  ==========================================================================================
instruments.retrained       cut price minus the price after retraining at the same rate
instruments.forks           log2 of the spread of independent seeds over that of forks, minus 1
instruments.placement       loss of a uniform rank minus that of placed ranks, both retrained
instruments.norm            minus the rank correlation of update norm and learn over modules
instruments.scale           1 minus the scale of the whole update with the lowest task loss
==========================  ==========================================================================================
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from lorascope.papers.judging.study_statistics import Comparison, Constant, OfTable

TEACHER = "LoRA, rank 4, text of a teacher"
"""Arm: students of a planted teacher whose modules need different ranks."""
SENTENCES = "LoRA, rank 8, few sentences"
"""Arm: minilm on few reviews of products, for about twice the steps of its best evaluation."""
FORK_STEP, LATE_STEP = 100, 175
ORDER_BOUND = 0.5
"""Rank correlation from which a norm would be a usable order of the modules."""
FLIPPED = 0.3
"""Fraction of labels that are wrong in the control of the best scale."""


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


def norm_order(modules: pd.DataFrame) -> float:
    """Return the rank correlation of ``norm`` and learn over modules; see ``repeat_order`` for the columns."""
    learn = modules["learn_even"] + modules["learn_odd"]
    return float(modules["norm"].rank().corr(learn.rank()))


def repeat_order(modules: pd.DataFrame) -> float:
    """Return the rank correlation that learn by module would have with learn on as many other rows.

    ``learn_even`` and ``learn_odd`` are learn on two halves of the rows. Their correlation r, corrected for the number
    of rows by the formula of Spearman and Brown, becomes 2 r / (1 + r).
    """
    of_halves = float(modules["learn_even"].rank().corr(modules["learn_odd"].rank()))
    return 2 * of_halves / (1 + of_halves)


def best_scale(curve: pd.DataFrame, flipped: float = 0.0) -> float:
    """Return the scale with the lowest task loss: the vertex of the parabola through it and its neighbors.

    Parameters
    ----------
    curve : DataFrame
        ``scale``, evenly spaced and increasing, ``loss`` and ``wrong_loss`` (mean task loss with the right and with the
        other label, nats).
    flipped : float
        Fraction of labels that are wrong. Default 0.
    """
    scales = curve["scale"].to_numpy()
    losses = ((1 - flipped) * curve["loss"] + flipped * curve["wrong_loss"]).to_numpy()
    # The lowest value at an end of the scales is the end itself.
    lowest = int(losses.argmin())
    if lowest in (0, len(scales) - 1):
        return float(scales[lowest])
    before, center, after = losses[lowest - 1 : lowest + 2]
    offset = (before - after) / (before - 2 * center + after) / 2
    return float(scales[lowest] + offset * (scales[1] - scales[0]))


_CUT = OfTable(partial(student_loss, name="cut to rank 2"), "students", TEACHER)
_RETRAINED = OfTable(partial(student_loss, name="rank 2"), "students", TEACHER)
_SHORT = OfTable(partial(student_loss, name="rank 2, a quarter of the steps"), "students", TEACHER)
_UNIFORM = OfTable(partial(student_loss, name="rank 2", best=True), "students", TEACHER)
_PLACED = OfTable(partial(student_loss, name="placed ranks", best=True), "students", TEACHER)
_PLANTED = OfTable(partial(student_loss, name="planted ranks"), "students", TEACHER)
_FORKS = OfTable(partial(halvings, step=FORK_STEP), "forks", TEACHER)
_LATE_FORKS = OfTable(partial(halvings, step=LATE_STEP), "forks", TEACHER)
_NORM = OfTable(norm_order, "modules", SENTENCES)
_REPEATED = OfTable(repeat_order, "modules", SENTENCES)
_SCALE = OfTable(best_scale, "curve", SENTENCES)
_FLIPPED_SCALE = OfTable(partial(best_scale, flipped=FLIPPED), "curve", SENTENCES)

QUESTIONS = {
    "instruments.retrained": Comparison(_CUT - _RETRAINED, positive=_CUT - _SHORT),
    "instruments.forks": Comparison(_FORKS, positive=_LATE_FORKS),
    "instruments.placement": Comparison(_UNIFORM - _PLACED, positive=_UNIFORM - _PLANTED),
    # If other rows give the modules another order by learn, a norm cannot have that order.
    "instruments.norm": Comparison(-_NORM, positive=Constant(ORDER_BOUND) - _REPEATED),
    "instruments.scale": Comparison(Constant(1.0) - _SCALE, positive=Constant(1.0) - _FLIPPED_SCALE),
}
"""Comparison of every claim, by id; the registry of the papers does not have them."""
