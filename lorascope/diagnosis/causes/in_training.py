"""Faults that only a training in progress shows: gradients, the optimizer, and its first steps."""

from __future__ import annotations

import math

import numpy as np

from lorascope.diagnosis.case import largest_rows
from lorascope.diagnosis.causes.finding import DoctorRule, Findings, finding, inflect, power_of_ten, rate_phrase
from lorascope.diagnosis.training_case import TrainingEvidence
from lorascope.files.printable import count_phrase

RESTING = 3  # steps: a warm-up starts with at most one step at learning rate 0
LARGE = 10.0  # fraction of |W|: healthy adapters of tiny models, whose weights are small, reach about 3
SAME = 1e-6  # relative difference of losses: float32 resolves 1e-7, and different batches differ by far more
FLAT = 5  # losses: fewer may be equal because a logger rounds them
SOLE = 0.999  # fraction of the squared norm: one module has more than 30 times the norm of all others together
FEWEST_ADAPTERS = 4  # modules: with fewer, one may well have most of the update


@DoctorRule(
    "LS019",
    severity="error",
    needs="training",
    problem="The learning rate is 0, so nothing trains.",
    evidence=f"the learning rate of all parameter groups is 0 at each of the first {RESTING} steps or more",
    fix="set a learning rate above 0, and step the scheduler after the optimizer",
    suppresses=("unused", "no-gradient", "loss-flat"),
    live_from=0,
)
def rate_zero(case: TrainingEvidence) -> Findings:
    """Find trainings in progress whose learning rate is 0 at every step."""
    if case.steps >= RESTING and case.moving_steps == 0:
        yield finding(f"the learning rate is 0 at all {case.steps} steps", steps=case.steps, threshold=RESTING)


@DoctorRule(
    "LS020",
    severity="caution",
    needs="training",
    problem="Training replaces the pretrained weights.",
    evidence=f"the learned update of all modules together is more than {LARGE:g} times the norm of their weights",
    fix="lower the learning rate (by a factor of 10), or the scale of the adapter",
    live_from=2,
)
def rate_large(case: TrainingEvidence) -> Findings:
    """Find trainings in progress that replace the pretrained weights."""
    modules, moved, norm = case.total_change
    if norm and moved > LARGE * norm:  # weights that are all zero are not pretrained
        (worst,) = largest_rows(modules, "relative_update")
        rate = case.learning_rate
        message = f"training changed the weights by {moved / norm:.3g} |W| in {case.steps} steps"
        message = f"{message}{rate_phrase(rate)}, most in {worst.module}"
        yield finding(message, moved=moved, weight_norm=norm, threshold=LARGE, lr=rate)


@DoctorRule(
    "LS021",
    severity="error",
    needs="training",
    problem="No gradient reaches the trained parameters.",
    evidence="the gradients of all trained parameters are zero or missing, and no module has changed",
    fix="call backward on a loss that depends on them: no torch.no_grad, detach, or labels of which all are ignored; "
    "gradient checkpointing requires model.enable_input_require_grads()",
    suppresses=("unused", "loss-flat"),
    live_from=1,
)
def no_gradient(case: TrainingEvidence) -> Findings:
    """Find trainings in progress without any gradient, in which nothing changes."""
    # A loop that resets the gradients before it records has none either, but its weights change.
    if not case.has_gradient and case.modules and all(module.moved == 0 for module in case.modules):
        yield finding(f"no trained parameter has a gradient at step {case.steps}, and no module has changed")


@DoctorRule(
    "LS022",
    severity="error",
    needs="training",
    problem="Trainable adapters are not in the optimizer.",
    evidence="an adapter has parameters with requires_grad, and the optimizer contains none of them",
    fix="create the optimizer after the adapter, with all parameters that require gradients",
    suppresses=("unused", "no-gradient", "frozen", "loss-flat"),
    live_from=0,
)
def not_optimized(case: TrainingEvidence) -> Findings:
    """Find trainings in progress with adapters that require gradients and are not in the optimizer."""
    if case.unoptimized:
        count = len(case.unoptimized)
        verb = inflect(count, "is", "are")
        message = f"{count_phrase(count, 'trainable adapter')} {verb} not in the optimizer"
        yield finding(message, case.unoptimized, modules=count)


@DoctorRule(
    "LS023",
    severity="caution",
    needs="training",
    problem="The loss never changes.",
    evidence=f"all recorded losses are equal up to {power_of_ten(SAME)}, at {FLAT} recordings or more, and not 0 while "
    "weights change",
    fix="check that the batches differ, that the loss depends on the model, and that the optimizer steps",
    live_from=FLAT,
)
def loss_flat(case: TrainingEvidence) -> Findings:
    """Find trainings in progress whose loss never changes."""
    losses = np.array(list(case.losses.values()))
    # A policy-gradient loss is 0 by its advantages, and has a gradient.
    learns = not losses.any() and any(module.moved > 0 for module in case.modules)
    if len(losses) >= FLAT and not learns and np.ptp(losses) <= SAME * np.abs(losses).max():
        evidence = {"loss": float(losses[0]), "recordings": len(losses), "threshold": SAME}
        yield finding(f"the loss is {losses[0]:.6g} at all {len(losses)} recordings", **evidence)


@DoctorRule(
    "LS024",
    severity="caution",
    needs="training",
    problem="One module has almost the whole update.",
    evidence=f"one of at least {FEWEST_ADAPTERS} adapters has more than {SOLE:.1%} of the squared norm "
    "(not checked for AdaLoRA)",
    fix="check this module for a separate learning rate, another scale, or inputs that are far larger",
    live_from=2,
)
def dominated(case: TrainingEvidence) -> Findings:
    """Find trainings in progress in which one module has almost the whole update."""
    modules = [module for module in case.adapted if math.isfinite(module.moved)]
    total = math.fsum(module.moved**2 for module in modules)
    if len(modules) >= FEWEST_ADAPTERS and not case.masks_components and total > 0:
        (worst,) = largest_rows(modules, "moved")
        fraction = worst.moved**2 / total
        if fraction > SOLE:
            message = f"one of {len(modules)} adapters has {fraction:.2%} of the squared norm of all updates"
            yield finding(message, [worst.module], share=fraction, threshold=SOLE)


@DoctorRule(
    "LS030",
    severity="caution",
    needs="training",
    problem="The model is farther from its base than the limit of alarms(kl=...).",
    evidence="the distance from the base on the rows to keep, as observe.kl records it, exceeds the limit",
    fix="stop here, lower the learning rate or the scale of the adapter, or mix rows to keep into the training rows",
    live_from=0,
)
def far_from_base(case: TrainingEvidence) -> Findings:
    """Find trainings in progress that moved the model farther from its base than allowed."""
    if case.distance > case.distance_limit:
        message = (
            f"the distance from the base is {case.distance:.3g} at step {case.steps}, above {case.distance_limit:.3g}"
        )
        yield finding(message, distance=case.distance, threshold=case.distance_limit)
