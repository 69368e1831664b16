"""Runs that are still open: what the registration asks for and the evidence does not have yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.learning_rates import choice_of_arm
from lorascope.papers.judging.looks import STOPPED
from lorascope.papers.judging.registration import Registered, Registration
from lorascope.papers.judging.verdicts import Pair, judge_claim, untrained_arms


@dataclass(frozen=True)
class OpenRun:
    """A missing run: an arm to train with a seed, at a rate, which is None for arms without one."""

    arm: str
    seed: int
    role: Literal["tuning", "judged", "baseline"]
    rate: float | None


def missing_runs(
    registration: Registration, pairs: Mapping[str, Pair], evidence: Evidence, block: Mapping[str, Any]
) -> list[OpenRun]:
    """Return the missing runs to train next: all that the first unfinished look of the first unfinished stage lacks.

    Runs that only figures show come before them, as soon as the rate of their arm is chosen: they are few, and the
    looks may use up the budget.

    Parameters
    ----------
    registration : Registration
        Claims, arms and stages.
    pairs : mapping id -> (Statistic, Statistic)
        Statistic and control of each judged claim.
    evidence : Evidence
        The finished runs.
    block : mapping
        The machine that trains; see ``kept_runs.BLOCK``. Judged runs of other machines do not count.

    Returns
    -------
    list of OpenRun
        In the order of the claims; empty if every claim is judged and every figure has its runs.
    """
    on_block = evidence.in_block(block)
    if of_figures := list(_of_figures(registration, evidence, on_block)):
        return of_figures
    untrained = untrained_arms(on_block, registration.arms)
    for stage in registration.stages:
        claims = [claim for id, claim in registration.of_tier("primary", "secondary").items() if stage.has(id)]
        for look in stage.looks:
            runs: dict[OpenRun, None] = {}  # a set in the order of the claims
            for claim in claims:
                if not look:  # the choice of the rates
                    runs |= dict.fromkeys(_of_tuning(claim, registration, evidence))
                elif not untrained.keys() & set(claim.arms):
                    runs |= dict.fromkeys(_of_look(claim, look, registration, pairs, evidence, on_block))
            if runs:
                return list(runs)
    return []


def _of_figures(registration: Registration, evidence: Evidence, on_block: Evidence) -> Iterator[OpenRun]:
    """Yield the runs of arms that no claim uses, arm by arm, so that the first figures are complete early."""
    for arm in registration.arms.values():
        if not arm.seeds:
            continue
        rate = choice_of_arm(registration, evidence.runs, arm.label)[1].rate
        for seed in range(registration.first_seed, registration.first_seed + arm.seeds):
            if rate is not None and not on_block.has(arm.label, seed):
                yield OpenRun(arm.label, seed, "judged", rate)


def _of_tuning(claim: Registered, registration: Registration, evidence: Evidence) -> Iterator[OpenRun]:
    for label in claim.arms:
        if not registration.arms[label].fields:
            continue
        tuned, choice = choice_of_arm(registration, evidence.runs, label)
        done = evidence.runs[(evidence.runs["arm"] == tuned.label) & (evidence.runs["role"] == "tuning")]
        trained = set(zip(done["seed"], done["rate"], strict=True))
        for rate in choice.missing:
            for seed in tuned.tuning_seeds:
                if (seed, rate) not in trained:
                    yield OpenRun(tuned.label, seed, "tuning", rate)


def _of_look(
    claim: Registered,
    look: int,
    registration: Registration,
    pairs: Mapping[str, Pair],
    evidence: Evidence,
    on_block: Evidence,
) -> Iterator[OpenRun]:
    design = claim.design
    if look > len(design.seeds):
        return
    judged = judge_claim(claim, pairs[claim.id], on_block)
    if judged and judged.verdict.note != STOPPED:
        return  # an earlier look decided it
    for seed in range(design.first_seed, design.first_seed + design.seeds[look - 1]):
        for label in claim.arms:
            if on_block.has(label, seed):
                continue
            arm = registration.arms[label]
            if arm.baseline:
                # A baseline has one run, which counts for every seed.
                yield OpenRun(label, design.first_seed, "baseline", None)
            else:
                rate = None
                if arm.fields:
                    rate = choice_of_arm(registration, evidence.runs, label)[1].rate
                yield OpenRun(label, seed, "judged", rate)
