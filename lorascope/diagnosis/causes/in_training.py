"""Faults that only a training in progress shows: gradients, the optimizer, and its first steps."""

from __future__ import annotations

import math

import numpy as np

from lorascope.diagnosis.case import largest
from lorascope.diagnosis.causes.finding import DoctorRule, Found, at_rate, found
from lorascope.diagnosis.training_case import TrainingEvidence
from lorascope.files.printable import count_phrase

RESTING = 3  # steps: a warm-up starts with at most one step at learning rate 0
LARGE = 10.0  # fraction of |W|: healthy adapters of tiny models, whose weights are small, reach about 3
SAME = 1e-6  # relative difference of losses: float32 resolves 1e-7, and different batches differ by far more
FLAT = 5  # losses: fewer may be equal because a logger rounds them
SOLE = 0.999  # fraction of the squared norm: one module has more than 30 times the norm of all others together
SEVERAL = 4  # modules: with fewer, one may well have most of the update


@DoctorRule(id="LS019", suppresses=("unused", "no-gradient", "loss-flat"), live_from=0)
def rate_zero(case: TrainingEvidence) -> Found:
    """Find trainings whose learning rate is 0 at every step."""
    if case.steps >= RESTING and case.moving_steps == 0:
        yield found(f"the learning rate is 0 at all {case.steps} steps", steps=case.steps, threshold=RESTING)


@DoctorRule(id="LS020", live_from=2)
def rate_large(case: TrainingEvidence) -> Found:
    """Find trainings that replace the pretrained weights."""
    known, moved, norm = case.total_change
    if norm and moved > LARGE * norm:  # weights that are all zero are not pretrained
        (most,) = largest(known, "relative_update")
        rate = case.learning_rate
        message = f"training changed the weights by {moved / norm:.3g} |W| in {case.steps} steps"
        message = f"{message}{at_rate(rate)}, most in {most.module}"
        yield found(message, moved=moved, weight_norm=norm, threshold=LARGE, lr=rate)


@DoctorRule(id="LS021", suppresses=("unused", "loss-flat"), live_from=1)
def no_gradient(case: TrainingEvidence) -> Found:
    """Find trainings without any gradient, in which nothing changes."""
    # A loop that resets the gradients before it records has none either, but its weights change.
    if not case.has_gradient and case.modules and all(each.moved == 0 for each in case.modules):
        yield found(f"no trained parameter has a gradient at step {case.steps}, and no module has changed")


@DoctorRule(id="LS022", suppresses=("unused", "no-gradient", "frozen", "loss-flat"), live_from=0)
def not_optimized(case: TrainingEvidence) -> Found:
    """Find adapters that require gradients and are not in the optimizer."""
    if case.unoptimized:
        count = len(case.unoptimized)
        verb = "is" if count == 1 else "are"
        yield found(
            f"{count_phrase(count, 'trainable adapter')} {verb} not in the optimizer", case.unoptimized, modules=count
        )


@DoctorRule(id="LS023", live_from=FLAT)
def loss_flat(case: TrainingEvidence) -> Found:
    """Find losses that never change."""
    losses = np.array(list(case.losses.values()))
    # A policy-gradient loss is 0 by its advantages, and has a gradient.
    learns = not losses.any() and any(each.moved > 0 for each in case.modules)
    if len(losses) >= FLAT and not learns and np.ptp(losses) <= SAME * np.abs(losses).max():
        evidence = {"loss": float(losses[0]), "recordings": len(losses), "threshold": SAME}
        yield found(f"the loss is {losses[0]:.6g} at all {len(losses)} recordings", **evidence)


@DoctorRule(id="LS024", live_from=2)
def dominated(case: TrainingEvidence) -> Found:
    """Find adapters in which one module has almost the whole update."""
    known = [each for each in case.adapted if math.isfinite(each.moved)]
    total = math.fsum(each.moved**2 for each in known)
    if len(known) >= SEVERAL and not case.masks_components and total > 0:
        (most,) = largest(known, "moved")
        share = most.moved**2 / total
        if share > SOLE:
            message = f"one of {len(known)} adapters has {share:.2%} of the squared norm of all updates"
            yield found(message, [most.module], share=share, threshold=SOLE)
