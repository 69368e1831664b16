"""Trainings that changed too little, diverged, or were given the wrong modules or rows."""

from __future__ import annotations

import math

import numpy as np

from lorascope.diagnosis.case import Case, known_rows, largest_rows
from lorascope.diagnosis.causes.finding import DoctorRule, Findings, finding, module_names, power_of_ten, rate_phrase
from lorascope.diagnosis.training_case import Evidence

STILL = 1e-4  # fraction of |W|: below the resolution of float16 and bfloat16, 5e-4 and 4e-3, so merging loses it
WORSE = 1.0  # nats: cross-entropies of batches differ by less
NOISE = 3.0  # median differences of successive losses: the first of noisy losses is rarely this far below the others
FAR = 10.0  # multiple of the first loss: a sufficient increase, because a diverged loss may be as noisy as it is large
FEW = 5  # losses: fewer have no usual difference
SINGLE = 1.01  # effective rank: real training exceeds it, identical components give 1 up to rounding
ROOM = 4  # components: with fewer, a single direction is not suspicious


@DoctorRule(
    "LS014",
    severity="caution",
    needs="weights",
    problem="Training changed the weights, but hardly.",
    evidence=f"the learned update of all modules together is below {power_of_ten(STILL)} of the norm of their weights",
    fix="raise the learning rate by a factor of 10 or more (FourierFT needs far more than LoRA), or train longer",
)
def rate_small(case: Case) -> Findings:
    """Find training runs that changed the weights, but hardly."""
    if "search" in (case.meta.phase or ()):  # AutoLoRA discards the factors of its search, and keeps the ranks
        return
    change = case.total_change
    if not change.weight_norm:
        return
    fraction = change.moved / change.weight_norm
    if 0 < fraction < STILL:
        rate = case.learning_rate
        message = f"training changed the weights by only {fraction:.1e} of |W|, less than {STILL:g}"
        yield finding(f"{message}{rate_phrase(rate)}", moved=fraction, threshold=STILL, lr=rate)


@DoctorRule(
    "LS015",
    severity="error",
    needs="history",
    problem="The loss increased far above its first value, or became NaN.",
    evidence=f"the median of the last losses exceeds the first loss by {WORSE:g} nat, by half of it, and by "
    f"{NOISE:g} usual differences of losses or {FAR:g} times the first loss; or it is NaN",
    fix="check the batch and the loss function if the loss became NaN while the weights were finite; else lower the "
    "learning rate (by a factor of 10), warm up longer, or clip gradients",
    suppresses=("rate-large",),
    live_from=0,
)
def diverged(case: Evidence) -> Findings:
    """Find training runs whose loss ended far above the first one, or became NaN."""
    rate, error = case.learning_rate, case.error
    if "became" in error:
        yield finding(f"training stopped: {error.partition(':')[0]}", error=error, lr=rate)
        return
    losses = np.array(list(case.losses.values()))
    count = len(losses)
    if not count:
        return
    # The last fifth, but as many as have a usual difference unless that is more than half of a short training.
    tail = losses[-max(min(FEW, count // 2), count // 5) :]
    start, end = float(losses[0]), float(np.median(tail))
    usual, noise = 0.0, math.inf  # without an estimate of the noise, only FAR counts
    if count >= FEW:
        with np.errstate(invalid="ignore"):  # infinite losses
            usual = float(np.median(np.abs(np.diff(losses))))
    if count >= case.fewest_losses:
        noise = NOISE * usual
    limit = max(WORSE, start / 2, min(FAR * start, noise))
    # The value of a policy-gradient loss, which starts at 0 or has both signs, does not show success.
    comparable = start > 0 and not (losses < 0).any()
    if math.isnan(end) or (comparable and end - start >= limit):
        message = f"the loss went from {start:.3g} to {end:.3g} (median of the last {len(tail)} of {count})"
        message += rate_phrase(rate)
        if math.isnan(end) and case.modules:  # the finding about weights that are NaN suppresses this one
            message += "; the weights of all modules are finite"
        yield finding(message, start=start, end=end, threshold=limit, lr=rate)


@DoctorRule(
    "LS016",
    severity="caution",
    problem="The updates use a single direction of their rank.",
    evidence=f"the effective rank is at most {SINGLE:g} in more than half of the modules that use at least "
    f"{ROOM} components",
    fix="initialize A randomly (equal rows get equal gradients and stay equal); otherwise rank 1 is enough",
    live_from=2,
)
def collapsed(case: Evidence) -> Findings:
    """Find training runs whose updates use a single direction of their rank."""
    wide = [module for module in case.adapted if module.used >= ROOM and module.update_norm > 0]
    measured = known_rows(wide, "effective_rank")
    narrow = [module for module in measured if module.effective_rank <= SINGLE]
    if len(narrow) > len(measured) / 2:
        (widest,), (highest,) = largest_rows(measured, "used"), largest_rows(narrow, "effective_rank")
        rank = f"effective rank at most {SINGLE:g} of {int(widest.used)}"
        message = f"{len(narrow)} of {len(measured)} updates have one direction ({rank})"
        evidence = {"modules": len(narrow), "of": len(measured), "effective_rank": highest.effective_rank}
        yield finding(message, module_names(narrow), **evidence, threshold=SINGLE)


@DoctorRule(
    "LS017",
    severity="error",
    needs="base",
    problem="Two names of one weight each have an adapter.",
    evidence="embedding and head share their weight, and both are adapted",
    fix="adapt only one of them, or untie them first (tie_word_embeddings=False) and save the base",
    live_from=0,
)
def tied_twice(case: Evidence) -> Findings:
    """Find training runs that adapted tied weights under each of their two names."""
    for pair in case.tied:
        problem = "are one weight of the base, and each has an adapter: merging one overwrites the other"
        yield finding(f"{' and '.join(pair)} {problem}", modules=[*pair])


@DoctorRule(
    "LS018",
    severity="caution",
    needs="history",
    problem="Evaluation rows are also training rows.",
    evidence="the fraction of the evaluation rows that training saw is above 0 (by object identity, for a Trainer)",
    fix="use separate rows for eval_dataset, such as the test rows of train_test_split",
)
def leak(case: Case) -> Findings:
    """Find training runs that saw rows of the evaluation."""
    overlap = case.meta.eval_overlap or 0.0
    if overlap > 0:
        rows = f"{100 * overlap:.3g}% of the evaluation rows are training rows"
        yield finding(f"{rows}, so they do not measure generalization", share=overlap, threshold=0.0)
