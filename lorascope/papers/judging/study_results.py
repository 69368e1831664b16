"""Results of the second edition: effects by seed, their intervals, and the words of the claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.papers.judging.kept_study import FIRST_SEED, StudyEvidence
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration
from lorascope.papers.judging.study_statistics import StudyComparison, are_learned, effect_interval, seed_effects
from lorascope.papers.judging.words import NO_HEADROOM, NOT_LEARNED, NOT_RUN, excludes, has_headroom, pair_word, word

EFFECT_COLUMNS = ["claim", "truth", "seed", "effect"]
_INTERVAL = ("effect", "low", "high")
RESULT_COLUMNS = [
    "claim", "n", *_INTERVAL, "word", "pair", *(f"against_{name}" for name in _INTERVAL),
    *(f"difference_{name}" for name in _INTERVAL), *(f"positive_{name}" for name in _INTERVAL), "excludes_zero",
    "excludes_printed", "note",
]  # fmt: skip


_TEXTS = ("word", "pair", "excludes_zero", "excludes_printed", "note")


class StudyResults(NamedTuple):
    """Tables of the results.

    Parameters
    ----------
    effects : DataFrame
        ``claim, truth, seed, effect``: one row per effect and seed; the truth is "for", "against" or "positive".
    results : DataFrame
        ``RESULT_COLUMNS``: one row per claim. ``pair`` is the word of a pair, ``note`` says what was not learned or
        not run, and numbers are empty if there is no such effect.
    """

    effects: pd.DataFrame
    results: pd.DataFrame


def compute(
    registration: StudyRegistration, comparisons: Mapping[str, StudyComparison], evidence: StudyEvidence
) -> StudyResults:
    """Compute the effects and results of all registered claims that have a comparison.

    No effect of a claim is computed before all its runs are finished.

    Parameters
    ----------
    registration : StudyRegistration
        Claims and arms.
    comparisons : mapping id -> StudyComparison
        Effects of each claim.
    evidence : StudyEvidence
        Kept runs.
    """
    effects, results = [pd.DataFrame(columns=EFFECT_COLUMNS)], []
    for id, claim in registration.claims.items():
        if id in comparisons:
            result, of_claim = _judge(claim, comparisons[id], evidence, registration)
            results.append({"claim": id, **dict.fromkeys(_TEXTS, ""), **result})
            effects += of_claim
    # Without any effect, the first table gives the columns.
    merged = pd.concat(effects[1:] or effects, ignore_index=True)
    return StudyResults(merged, pd.DataFrame(results, columns=RESULT_COLUMNS))


def _judge(
    claim: StudyClaim, comparison: StudyComparison, evidence: StudyEvidence, registration: StudyRegistration
) -> tuple[dict[str, Any], list[pd.DataFrame]]:
    """Judge one claim; return its row of the results and its effects."""
    statistics = comparison.statistics()
    seeds = dict.fromkeys(statistics, range(FIRST_SEED, FIRST_SEED + claim.rule.seeds))
    if comparison.positive:
        # It may be another claim's effect, or have fewer runs, so its arms decide.
        count = min(registration.arms[label].seeds for label in comparison.positive.arms())
        seeds["positive"] = range(FIRST_SEED, FIRST_SEED + count)
    runs = sorted({(arm, seed) for name in statistics for arm in statistics[name].arms() for seed in seeds[name]})
    missing = [f"{arm}, seed {seed}" for arm, seed in runs if not evidence.has(arm, seed)]
    if missing:
        return {"n": 0, "word": NOT_RUN, "note": _first_of(missing)}, []
    unlearned = list(_unlearned(runs, evidence))
    values, intervals, effects = {}, {}, []
    for name, statistic in statistics.items():
        values[name] = by_seed = statistic(evidence, seeds[name])
        # A run that diverged has no number, and did not learn.
        if not unlearned and not np.isfinite(by_seed).all():
            raise ValueError(f"cannot judge claim {claim.id}: the effect {name!r} has values that are not finite")
    if "against" in values:
        values["difference"] = values["for"] - values["against"]
    for name, by_seed in values.items():
        # All arms of an effect by row have the same rows, so any of them gives their clusters.
        clusters = None
        if by_seed.ndim == 2:
            clusters = evidence.clusters(min(statistics[name].arms()), FIRST_SEED)
        intervals[name] = effect_interval(by_seed, clusters)
        if name in seeds:
            table = {"claim": claim.id, "truth": name, "seed": seeds[name], "effect": seed_effects(by_seed)}
            effects.append(pd.DataFrame(table))
    _, low, high, n = intervals["for"]
    row: dict[str, Any] = {"n": n, "excludes_zero": excludes(0.0, low, high)}
    for name, interval in intervals.items():
        prefix = f"{name}_".removeprefix("for_")
        row |= {f"{prefix}{column}": value for column, value in zip(_INTERVAL, interval, strict=False)}
    # Points of accuracy are not points of the gap.
    printed = claim.paper.printed
    if isinstance(printed, float) and claim.paper.printed_unit == claim.rule.unit:
        row["excludes_printed"] = excludes(printed, low, high)
    kind, positive = claim.rule.kind, intervals.get("positive")
    if unlearned:
        row |= {"word": NOT_LEARNED, "note": _first_of(unlearned)}
    elif positive and not has_headroom(kind, positive.low, positive.high):
        row["word"] = NO_HEADROOM
    else:
        row["word"] = word(kind, claim.rule.bound, low, high)
        if "difference" in intervals:
            row["pair"] = pair_word(row["word"], intervals["difference"].low)
    return row, effects


def _unlearned(runs: Sequence[tuple[str, int]], evidence: StudyEvidence) -> Iterator[str]:
    """Yield arm, phase, task and seed of everything that did not learn."""
    rows = pd.concat([evidence.judged(arm, seed) for arm, seed in runs])
    for arm, phase, task, seed in rows.loc[~are_learned(rows), ["arm", "phase", "task", "seed"]].to_numpy():
        # The last phase and a single task have no name.
        names = [arm, phase and f"phase {phase}", task and f"task {task}", f"seed {seed}"]
        yield ", ".join(filter(None, names))


def _first_of(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} more"
