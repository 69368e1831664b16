"""Trainings that changed too little, diverged, or were given the wrong modules or rows."""

from __future__ import annotations

import math

import numpy as np

from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes.finding import DoctorRule, Found, at_rate, found, names_of
from lorascope.diagnosis.training_case import Evidence

STILL = 1e-4  # fraction of |W|: below the resolution of float16 and bfloat16, 5e-4 and 4e-3, so merging loses it
WORSE = 1.0  # nats: cross-entropies of batches differ by less
NOISE = 3.0  # median differences of successive losses: the first of noisy losses is rarely this far below the others
FAR = 10.0  # multiple of the first loss: a sufficient increase, because a diverged loss may be as noisy as it is large
FEW = 5  # losses: fewer have no usual difference
SINGLE = 1.01  # effective rank: real training exceeds it, identical components give 1 up to rounding
ROOM = 4  # components: with fewer, a single direction is not suspicious


@DoctorRule(id="LS014")
def rate_small(case: Case) -> Found:
    """Find training runs that changed the weights, but hardly."""
    if "search" in (case.meta.phase or ()):  # AutoLoRA discards the factors of its search, and keeps the ranks
        return
    _, moved, norm = case.total_change
    share = moved / norm if norm else np.nan
    if 0 < share < STILL:
        rate = case.meta.settings.get("lr")
        message = f"training changed the weights by only {share:.1e} of |W|, less than {STILL:g}"
        yield found(f"{message}{at_rate(rate)}", moved=share, threshold=STILL, lr=rate)


@DoctorRule(id="LS015", suppresses=("rate-large",), live_from=0)
def diverged(case: Evidence) -> Found:
    """Find losses that ended far above the first one, or became NaN."""
    rate, error = case.learning_rate, case.error
    if "became" in error:
        yield found(f"training stopped: {error.partition(':')[0]}", error=error, lr=rate)
        return
    losses = np.array(list(case.losses.values()))
    count = len(losses)
    if not count:
        return
    last = losses[-max(min(FEW, count // 2), count // 5) :]
    start, end = float(losses[0]), float(np.median(last))
    with np.errstate(invalid="ignore"):  # infinite losses
        usual = float(np.median(np.abs(np.diff(losses)))) if count >= FEW else 0.0
    noise = NOISE * usual if count >= case.fewest_losses else math.inf
    limit = max(WORSE, start / 2, min(FAR * start, noise))
    # The value of a policy-gradient loss, which starts at 0 or has both signs, does not show success.
    comparable = start > 0 and not (losses < 0).any()
    if math.isnan(end) or (comparable and end - start >= limit):
        message = f"the loss went from {start:.3g} to {end:.3g} (median of the last {len(last)} of {count})"
        yield found(f"{message}{at_rate(rate)}", start=start, end=end, threshold=limit, lr=rate)


@DoctorRule(id="LS016", live_from=2)
def collapsed(case: Evidence) -> Found:
    """Find updates that use a single direction of their rank."""
    adapted = case.adapted
    wide = [each for each in adapted if each.used >= ROOM and each.update_norm > 0]
    known = [each for each in wide if not math.isnan(each.effective_rank)]
    narrow = [each for each in known if each.effective_rank <= SINGLE]
    if len(narrow) > len(known) / 2:
        rank = f"effective rank at most {SINGLE:g} of {int(max(each.used for each in known))}"
        message = f"{len(narrow)} of {len(known)} updates have one direction ({rank})"
        most = max(each.effective_rank for each in narrow)
        evidence = {"modules": len(narrow), "of": len(known), "effective_rank": most}
        yield found(message, names_of(narrow), **evidence, threshold=SINGLE)


@DoctorRule(id="LS017", live_from=0)
def tied_twice(case: Evidence) -> Found:
    """Find tied weights with an adapter under each of their two names."""
    for one, other in case.tied:
        problem = "are one weight of the base, and each has an adapter: merging one overwrites the other"
        yield found(f"{one} and {other} {problem}", modules=[one, other])


@DoctorRule(id="LS018")
def leak(case: Case) -> Found:
    """Find evaluation rows that training saw."""
    share = case.meta.eval_overlap or 0.0
    if share > 0:
        message = f"{100 * share:.3g}% of the evaluation rows are training rows, so they do not measure generalization"
        yield found(message, share=share, threshold=0.0)
