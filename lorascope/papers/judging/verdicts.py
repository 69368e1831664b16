"""Verdicts on all claims, computed from the evidence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from lorascope.analysis.recipe_tests import holm
from lorascope.analysis.seed_intervals import Estimate
from lorascope.files.printable import count_phrase, printable
from lorascope.papers.judging import looks
from lorascope.papers.judging.claims import format_effect
from lorascope.papers.judging.kept_runs import BLOCK, COUNT, NUMBER, SCORES, TEXT, Evidence
from lorascope.papers.judging.registration import Registered
from lorascope.papers.judging.statistics import Reads, Statistic, estimate_effect
from lorascope.papers.judging.value_sources import COLUMNS, add_sources

Pair = tuple[Statistic, Statistic]
"""Statistic and control of a claim."""
FALSE_DISCOVERIES = 0.05
"""Bound on the false discovery rate of the secondary claims (Benjamini and Hochberg)."""
VERDICT_COLUMNS = {
    "claim": TEXT, "tier": TEXT, "kind": TEXT, "bound": NUMBER, "unit": TEXT, "interval": TEXT, "outcome": TEXT,
    "n": COUNT, "note": TEXT, "look": NUMBER, "level": NUMBER, "effect": NUMBER, "low": NUMBER, "high": NUMBER,
    "half_seed": NUMBER, "half_row": NUMBER, "df": NUMBER, "p": NUMBER, "p_looks": NUMBER, "side": TEXT, "block": TEXT,
    "shown": TEXT, "all_seeds": TEXT, "uncorrected": TEXT, "adjusted_p": NUMBER, "arms_state": TEXT,
}  # fmt: skip
"""Columns of ``verdicts.csv``."""

CHANGED = "its runs are of another arm than registered"
"""Note of a claim that gets no verdict because its runs are not the registered ones."""

_TRIED, _FAILED, _AT_CHANCE = 5, 2, 0.05


def _arms(pair: Pair) -> set[str]:
    return pair[0].arms() | pair[1].arms()


@dataclass(frozen=True)
class _SeedBySeed(Statistic):
    """A statistic (seed,) that is computed from one seed at a time, because each seed has a task of other test rows."""

    of: Statistic

    def reads(self) -> Reads:
        return self.of.reads()

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.atleast_1d(self.of(evidence, [seed])) for seed in seeds])


def _tasks_vary(evidence: Evidence, arms: Iterable[str], seeds: Sequence[int]) -> bool:
    runs = evidence.runs.set_index("run")["task_hash"]
    return any(runs[[evidence.run(arm, seed) for seed in seeds]].nunique() > 1 for arm in arms)


def estimate_claim(
    registered: Registered, pair: Pair, evidence: Evidence, seeds: Sequence[int]
) -> tuple[Estimate, pd.DataFrame]:
    """Estimate the effect of a claim over these seeds; see ``estimate_effect``.

    Raises
    ------
    ValueError
        A value is not finite, such as the log of a norm of zero, or a file of a run is missing or has other columns.
    """
    statistic, control = pair
    method = registered.design.interval
    if method == "t" and _tasks_vary(evidence, _arms(pair), seeds):
        statistic, control = _SeedBySeed(statistic), _SeedBySeed(control)
    with _naming(registered.id, pair):
        if method == "two-way" and evidence.clusters(min(_arms(pair)), seeds[0]).max(initial=0) < 1:
            raise ValueError("rows.parquet must have two or more clusters of test rows")
        return estimate_effect(statistic, control, evidence, seeds, method)


@contextmanager
def _naming(id: str, pair: Pair) -> Iterator[None]:
    """Name the claim and its files in the error if a statistic cannot be computed."""
    try:
        with warnings.catch_warnings():
            # The mean of a table without rows is not finite, which is an error.
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    except Exception as error:  # a table without a column, or with texts, raises KeyError, TypeError and others
        names = sorted({name for name, _ in pair[0].reads() | pair[1].reads()})
        files = dict.fromkeys("predictions" if name in SCORES else f"kept/{name}" for name in names)
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot judge {id} from {' and '.join(files)}: {printable(reason)}") from error


def judge_claim(registered: Registered, pair: Pair, evidence: Evidence) -> tuple[looks.Verdict, pd.DataFrame] | None:
    """Judge a claim by the runs of one machine, at its registered looks.

    Parameters
    ----------
    registered : Registered
        Claim with its design.
    pair : (Statistic, Statistic)
        Statistic and control.
    evidence : Evidence
        Runs of one machine; see ``Evidence.in_block``.

    Returns
    -------
    Verdict
        Verdict of the look at which the claim ended.
    DataFrame
        ``seed, statistic, control, effect`` at this look. None instead of both before the first look.
    """
    seeds = evidence.seeds(_arms(pair), registered.design.first_seed)
    if len(seeds) < registered.design.looks.seeds[0]:
        return None
    tables: dict[int, pd.DataFrame] = {}

    def estimate(n: int) -> Any:
        effect, tables[n] = estimate_claim(registered, pair, evidence, seeds[:n])
        return effect

    verdict = looks.judge(registered.claim, registered.design.looks, estimate, len(seeds))
    return verdict, tables[verdict.effect.n]


def judging_block(registered: Registered, pair: Pair, evidence: Evidence) -> Mapping[str, Any] | None:
    """Return the machine whose runs judge a claim: the first to reach the first look, else that with most seeds."""
    arms, first, runs = _arms(pair), registered.design.looks.seeds[0], evidence.runs.reset_index(drop=True)
    found = []
    for block in evidence.blocks():
        part = evidence.in_block(block)
        if seeds := part.seeds(arms, registered.design.first_seed)[:first]:
            needed = {part.run(arm, seed) for arm in arms for seed in seeds}
            # Runs are listed in the order in which they finished.
            found.append((-len(seeds), int(runs.index[runs["run"].isin(needed)].max()), block))
    return min(found, key=lambda each: each[:2])[2] if found else None


def untrained_arms(evidence: Evidence, may_void: Callable[[str], bool] = lambda arm: True) -> set[str]:
    """Return the arms that did not train, whose claims are void.

    Those are arms of which two or more of the first five judged seeds end within five points of the most frequent class
    on the validation split, or any ends with a loss that is not finite.
    """
    runs = evidence.runs[evidence.runs["role"] == "judged"].sort_values("seed")
    first = runs.groupby("arm").head(_TRIED)
    at_chance = first["validation_metric"] - first["validation_chance"] <= _AT_CHANCE
    failed = at_chance.groupby(first["arm"]).sum() >= _FAILED
    losses = runs[["validation_loss", "test_loss"]].to_numpy("float64")
    found = {*failed.index[failed], *runs["arm"][~np.isfinite(losses).all(axis=1)]}
    return {arm for arm in found if may_void(arm)}


def judge_all(
    claims: Mapping[str, Registered],
    pairs: Mapping[str, Pair],
    evidence: Evidence,
    may_void: Callable[[str], bool] = lambda arm: True,
    changed: Container[str] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judge every claim that has runs.

    Parameters
    ----------
    claims : mapping id -> Registered
        Registered claims.
    pairs : mapping id -> (Statistic, Statistic)
        Statistic and control of the claims.
    evidence : Evidence
        All runs.
    may_void : callable
        ``may_void(arm)`` returns whether claims are void if this arm does not train.
    changed : container of str
        Claims that get no verdict because their runs are of another arm than registered.

    Returns
    -------
    verdicts : DataFrame
        One row per claim, in the order of the registration.
    values : DataFrame
        ``claim, seed, look, statistic, control, effect`` of every verdict, and the columns of ``value_sources``.
    """
    rows, values = [], []
    untrained: dict[str, set[str]] = {}
    for id, registered in claims.items():
        block = judging_block(registered, pairs[id], evidence)
        part, machine = (evidence.in_block(block), name_machine(block)) if block else (evidence, "")
        if machine not in untrained:
            untrained[machine] = untrained_arms(part, may_void)
        if failed := sorted(untrained[machine] & _arms(pairs[id])):
            rows.append(_describe(registered) | {"outcome": "void", "note": f"{failed[0]} did not train"})
            continue
        found = judge_claim(registered, pairs[id], part) if block else None
        rows.append(_describe(registered))
        if block and found is None:
            rows[-1]["n"] = len(part.seeds(_arms(pairs[id]), registered.design.first_seed))
        if block and found is not None:
            rows[-1] |= _numbers(registered, found[0], block)
            with _naming(id, pairs[id]):
                rows[-1]["all_seeds"] = _over_all_seeds(registered, pairs[id], part, found[0])
                table = add_sources(found[1], pairs[id], part, registered.design.interval)
            values.append(table.assign(claim=id, look=found[0].look))
    for row in rows:
        row |= {"outcome": "inconclusive", "note": CHANGED} if row["claim"] in changed else {}
    verdicts = correct(pd.DataFrame(rows))
    columns = ["claim", "seed", "look", "statistic", "control", "effect", *COLUMNS]
    return verdicts, (pd.concat(values) if values else pd.DataFrame(columns=columns))[columns].reset_index(drop=True)


def _over_all_seeds(registered: Registered, pair: Pair, evidence: Evidence, verdict: looks.Verdict) -> str:
    """Return the effect over all kept seeds as text; "" for an open claim, and if no seeds came after its verdict."""
    if verdict.note == looks.STOPPED:
        return ""
    statistic, control = pair
    reads = {**statistic.reads(), **control.reads()}

    def is_kept(seed: int) -> bool:
        tables: dict[str, Any] = {"margin": evidence.margins, "nll": evidence.nll, **evidence.kept}
        return all(evidence.run(arm, seed) in tables.get(name, {}) for name, arm in reads)

    # Seeds that an arm got for other claims may lack what this one reads.
    seeds = list(takewhile(is_kept, evidence.seeds(_arms(pair), registered.design.first_seed)))
    if len(seeds) <= verdict.effect.n:
        return ""
    effect, low, high, n = estimate_claim(registered, pair, evidence, seeds)[0].interval(looks.ERROR)
    return f"{format_effect(registered.claim, effect, low, high)}, {count_phrase(n, 'seed')}"


def _describe(registered: Registered) -> dict[str, Any]:
    claim, bound = registered.claim, registered.bound
    named = {
        "claim": claim.id,
        "tier": registered.paper.tier,
        "kind": claim.kind,
        "bound": claim.bound,
        "unit": bound.unit,
    }
    unjudged = {"outcome": "inconclusive", "n": 0, "note": looks.STOPPED}
    return named | {"interval": registered.design.interval} | unjudged


def name_machine(block: Mapping[str, Any]) -> str:
    """Return the name of a machine in tables."""
    return " / ".join(str(block[name]) for name in BLOCK)


def _numbers(registered: Registered, verdict: looks.Verdict, block: Mapping[str, Any]) -> dict[str, Any]:
    effect, low, high, n = verdict.effect
    return {
        "look": verdict.look, "n": n, "level": verdict.level, "effect": effect, "low": low, "high": high,
        "half_seed": verdict.half_seed, "half_row": verdict.half_row, "df": verdict.degrees,
        "p": verdict.p, "p_looks": verdict.p_looks, "outcome": verdict.outcome,
        "side": verdict.side, "block": name_machine(block), "note": verdict.note,
        "shown": format_effect(registered.claim, effect, low, high),
    }  # fmt: skip


def correct(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Correct the verdicts for the number of claims: Holm for the primary ones, Benjamini-Hochberg for the others.

    A primary claim keeps its verdict; Holm's p is printed next to it. A secondary claim that was decided before the
    correction, but whose adjusted p-value is above ``FALSE_DISCOVERIES``, becomes inconclusive. Claims without a
    verdict have p = 1.

    Returns
    -------
    DataFrame
        With ``uncorrected`` (the outcome before the correction), ``adjusted_p`` and the corrected ``outcome``.
    """
    verdicts = verdicts.reindex(columns=[*dict.fromkeys([*verdicts.columns, "p_looks", "p"])])
    p = verdicts["p_looks"].astype("float64").fillna(1.0).where(verdicts["outcome"] != "void", 1.0)
    p = p.where(~verdicts["note"].isin([looks.STOPPED, CHANGED]), 1.0)
    verdicts = verdicts.assign(uncorrected=verdicts["outcome"], adjusted_p=np.nan)
    for tier, adjust in (("primary", holm), ("secondary", false_discovery_control)):
        if (of_tier := verdicts["tier"] == tier).any():
            verdicts.loc[of_tier, "adjusted_p"] = adjust(p[of_tier].to_numpy())
    number = int((verdicts["tier"] == "secondary").sum())
    lost = (
        (verdicts["tier"] == "secondary")
        & verdicts["outcome"].isin(["supported", "not supported"])
        & (verdicts["adjusted_p"] > FALSE_DISCOVERIES)
    )
    verdicts.loc[lost, "outcome"] = "inconclusive"
    verdicts.loc[lost, "note"] = f"decided before the correction for {count_phrase(number, 'claim')}"
    return verdicts
