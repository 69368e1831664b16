"""Verdicts on all claims, computed from the evidence."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from lorascope.analysis.recipe_tests import holm
from lorascope.analysis.seed_intervals import Estimate
from lorascope.files.printable import count_phrase, printable
from lorascope.papers.judging import looks
from lorascope.papers.judging.claims import format_effect
from lorascope.papers.judging.csv_tables import COUNT, NUMBER, TEXT
from lorascope.papers.judging.kept_runs import BLOCK, SCORES, Evidence
from lorascope.papers.judging.registration import Registered, RegisteredArm
from lorascope.papers.judging.statistics import Method, OfRun, Reads, Simulated, Statistic, estimate_effect

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
SOURCE_COLUMNS = ("draws", "draw_error", "runs_statistic", "runs_control")
"""Columns of ``values.csv`` with the sources of a value."""

CHANGED = "its runs are of another arm than registered"
"""Note of a claim that gets no verdict because its runs are not the registered ones."""

PHASES = "phases"
"""Kept table ``phase, group, accuracy, chance``: test accuracy after each earlier phase, by group, and that of always
answering with the most frequent class."""

_TRIED, _FAILED, _AT_CHANCE = 5, 2, 0.05
_ALL = ""  # place of chance level: the whole task, whose groups have names


class JudgedClaim(NamedTuple):
    """Verdict of a claim, and ``seed, statistic, control, effect`` at the look at which it ended."""

    verdict: looks.Verdict
    values: pd.DataFrame


class _Candidate(NamedTuple):
    """A machine that may judge a claim: its seeds up to the first look, and the table row of the last run of these."""

    seeds: int
    last_row: int
    machine: Mapping[str, Any]


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
    """Estimate the effect of a claim over these seeds, for its verdict; see ``estimate_effect``.

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


def judge_claim(registered: Registered, pair: Pair, evidence: Evidence) -> JudgedClaim | None:
    """Return the verdict on a claim by the runs of one machine, at its registered looks.

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
    JudgedClaim or None
        None before the first look.
    """
    # The seeds have no gap, so none can be left out of a claim.
    seeds = evidence.seeds(_arms(pair), registered.design.first_seed)
    if len(seeds) < registered.design.looks.seeds[0]:
        return None
    tables: dict[int, pd.DataFrame] = {}

    def estimate(n: int) -> Any:
        effect, tables[n] = estimate_claim(registered, pair, evidence, seeds[:n])
        return effect

    verdict = looks.judge_at_looks(registered.claim, registered.design.looks, estimate, len(seeds))
    return JudgedClaim(verdict, tables[verdict.effect.n])


def judging_block(registered: Registered, pair: Pair, evidence: Evidence) -> Mapping[str, Any] | None:
    """Return the machine that gives the verdict on a claim: the first to reach the first look, else with most seeds."""
    arms, first, runs = _arms(pair), registered.design.looks.seeds[0], evidence.runs.reset_index(drop=True)
    candidates = []
    for machine in evidence.blocks():
        on_machine = evidence.in_block(machine)
        if seeds := on_machine.seeds(arms, registered.design.first_seed)[:first]:
            ids = {on_machine.run(arm, seed) for arm in arms for seed in seeds}
            candidates.append(_Candidate(len(seeds), int(runs.index[runs["run"].isin(ids)].max()), machine))
    if not candidates:
        return None
    # Runs are listed in the order in which they finished.
    return max(candidates, key=lambda candidate: (candidate.seeds, -candidate.last_row)).machine


def untrained_arms(evidence: Evidence, arms: Mapping[str, RegisteredArm] = MappingProxyType({})) -> dict[str, str]:
    """Return the arms that did not train, so that the verdict on their claims is void, with the reasons.

    In those arms, two or more of the first five judged seeds are at chance level in the same place, within five points
    of the most frequent class: on the validation split, in one group of the test rows (the groups of a mixture are its
    tasks), or at the end of one earlier phase. Others have a seed whose loss is not finite. Where the end of an arm may
    not void its claims, its earlier phases still do.
    """
    runs = evidence.judged.sort_values("seed")
    tasks = {task: _Groups.of_task(evidence, task) for task in runs["task_hash"].unique()}
    reasons: dict[str, str] = {}
    for arm in dict.fromkeys(runs["arm"]):
        of_arm, registered = runs[runs["arm"] == arm], arms.get(arm, RegisteredArm(arm))
        counts: Counter[str] = Counter()
        for run in of_arm.head(_TRIED).itertuples():
            counts.update(_phases_at_chance(evidence, run.run))
            if registered.may_void:
                counts.update(_groups_at_chance(evidence, run, tasks[run.task_hash]))
        locations = sorted(location for location, seeds in counts.items() if seeds >= _FAILED)
        losses = of_arm[["validation_loss", "test_loss"]].to_numpy("float64")
        if _ALL in locations:
            reasons[arm] = "chance level"
        elif locations:
            reasons[arm] = f"chance level in {', '.join(locations)}"
        elif registered.may_void and not np.isfinite(losses).all():
            reasons[arm] = "a loss is not finite"
    return reasons


class _Groups(NamedTuple):
    """Groups of a task's test rows: the group of each row, and the fraction of the most frequent class by group."""

    of_row: Any
    chance: pd.Series

    @classmethod
    def of_task(cls, evidence: Evidence, task: str) -> _Groups:
        rows = evidence.rows[evidence.rows["task_hash"] == task].sort_values("row")
        labels = rows.groupby("group")["label"]
        chance = labels.agg(lambda of_group: of_group.value_counts(normalize=True).max())
        # A group of one class has no chance level, and texts have no classes.
        return cls(rows["group"].to_numpy(), chance[labels.nunique() > 1])


def _phases_at_chance(evidence: Evidence, run: str) -> set[str]:
    """Return the earlier phases of a run after which one of its groups is at chance level."""
    phases = evidence.kept.get(PHASES, {}).get(run)
    if phases is None:
        return set()
    at_chance = phases["accuracy"] - phases["chance"] <= _AT_CHANCE
    return {f"phase {phase}" for phase in phases.loc[at_chance, "phase"]}


def _groups_at_chance(evidence: Evidence, run: Any, groups: _Groups) -> set[str]:
    """Return the groups of test rows in which a run is at chance level, and ``_ALL`` for the validation split."""
    at_chance = set()
    if run.validation_metric - run.validation_chance <= _AT_CHANCE:
        at_chance.add(_ALL)
    margins = evidence.margins.get(run.run)
    # Verification names a run whose number of rows differs.
    if margins is not None and len(margins) == len(groups.of_row):
        accuracy = pd.Series(margins > 0).groupby(groups.of_row).mean()
        at_chance |= {*groups.chance.index[accuracy[groups.chance.index] - groups.chance <= _AT_CHANCE]}
    return at_chance


def judge_all(
    claims: Mapping[str, Registered],
    pairs: Mapping[str, Pair],
    evidence: Evidence,
    arms: Mapping[str, RegisteredArm] = MappingProxyType({}),
    changed: Container[str] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compute the verdicts on all claims that have runs.

    Parameters
    ----------
    claims : mapping id -> Registered
        Registered claims.
    pairs : mapping id -> (Statistic, Statistic)
        Statistic and control of the claims.
    evidence : Evidence
        All runs.
    arms : mapping label -> RegisteredArm
        Registered arms, which state whether claims are void if an arm does not train.
    changed : container of str
        Claims that get no verdict because their runs are of another arm than registered.

    Returns
    -------
    verdicts : DataFrame
        One row per claim, in the order of the registration.
    values : DataFrame
        ``claim, seed, look, statistic, control, effect`` of every verdict, and ``SOURCE_COLUMNS``.
    """
    rows, values = [], []
    untrained: dict[str, dict[str, str]] = {}
    for id, registered in claims.items():
        pair, row = pairs[id], _describe(registered)
        rows.append(row)
        block = judging_block(registered, pair, evidence)
        runs, machine = evidence, ""
        if block:
            runs, machine = evidence.in_block(block), name_machine(block)
        if machine not in untrained:  # the same for all claims on a machine
            untrained[machine] = untrained_arms(runs, arms)
        if failed := sorted(untrained[machine].keys() & _arms(pair)):
            row |= {"outcome": "void", "note": f"{failed[0]} did not train: {untrained[machine][failed[0]]}"}
        elif block and (judged := judge_claim(registered, pair, runs)):
            row |= _numbers(registered, judged.verdict, machine)
            with _naming(id, pair):
                row["all_seeds"] = _over_all_seeds(registered, pair, runs, judged.verdict)
                table = add_sources(judged.values, pair, runs, registered.design.interval)
            values.append(table.assign(claim=id, look=judged.verdict.look))
        elif block:
            row["n"] = len(runs.seeds(_arms(pair), registered.design.first_seed))
        if id in changed:  # last, because it overrides any outcome
            row |= {"outcome": "inconclusive", "note": CHANGED}
    columns = ["claim", "seed", "look", "statistic", "control", "effect", *SOURCE_COLUMNS]
    values = values or [pd.DataFrame(columns=columns)]
    return correct(pd.DataFrame(rows)), pd.concat(values)[columns].reset_index(drop=True)


def add_sources(values: pd.DataFrame, pair: Pair, evidence: Evidence, method: Method) -> pd.DataFrame:
    """Add to the values behind a verdict the sources of each.

    Parameters
    ----------
    values : DataFrame
        One row per ``seed``.
    pair : (Statistic, Statistic)
        Statistic and control.
    evidence : Evidence
        Runs of one machine.
    method : str
        Method of the interval. Pseudo-values of the jackknife come from the runs of all seeds.

    Returns
    -------
    DataFrame
        With ``SOURCE_COLUMNS``. ``runs_statistic`` and ``runs_control`` are run ids, separated by spaces, by seed and
        then by arm. ``draws`` and ``draw_error`` are the number of draws and the standard error of a control that is
        simulated, else missing.
    """
    statistic, control = pair
    seeds, rows = values["seed"].tolist(), []
    for seed in seeds:
        sources = seeds if method == "jackknife" else [seed]
        runs = _runs_of(statistic, evidence, sources), _runs_of(control, evidence, sources)
        rows.append((*_draws(control, evidence, seed), *runs))
    columns = pd.DataFrame(rows, columns=list(SOURCE_COLUMNS), index=values.index, dtype="object")
    return values.join(columns.astype({"draws": "Int64", "draw_error": "Float64"}))


def _runs_of(statistic: Statistic, evidence: Evidence, seeds: Sequence[int]) -> str:
    runs = [evidence.run(arm, seed) for seed in seeds for arm in sorted(statistic.arms())]
    return " ".join(dict.fromkeys(runs))  # a baseline is the same for all seeds


def _draws(control: Statistic, evidence: Evidence, seed: int) -> tuple[int | None, float | None]:
    """Return the number of draws and the standard error of a control; None if it is not simulated."""
    if isinstance(control, Simulated):
        return control.draws, control.error
    if isinstance(control, OfRun):
        table = evidence.table(control.table, control.arm, seed)
        if {"draws", "error"} <= set(table):
            # The control selects its row of the table, so it also selects that row's draws and error.
            number, error = (control.value(table.assign(value=table[name])) for name in ("draws", "error"))
            return int(number), error
    return None, None


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
    return {
        "claim": claim.id, "tier": registered.paper.tier, "kind": claim.kind, "bound": claim.bound, "unit": bound.unit,
        "interval": registered.design.interval, "outcome": "inconclusive", "n": 0, "note": looks.STOPPED,
    }  # fmt: skip


def name_machine(block: Mapping[str, Any]) -> str:
    """Return the name of a machine in the table of verdicts."""
    return " / ".join(str(block[name]) for name in BLOCK)


def _numbers(registered: Registered, verdict: looks.Verdict, machine: str) -> dict[str, Any]:
    effect, low, high, n = verdict.effect
    return {
        "look": verdict.look, "n": n, "level": verdict.level, "effect": effect, "low": low, "high": high,
        "half_seed": verdict.half_seed, "half_row": verdict.half_row, "df": verdict.degrees,
        "p": verdict.p, "p_looks": verdict.p_looks, "outcome": verdict.outcome,
        "side": verdict.side, "block": machine, "note": verdict.note,
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
    # Before any claim has its first look, no row has p-values.
    verdicts = verdicts.reindex(columns=[*dict.fromkeys([*verdicts.columns, "p_looks", "p"])])
    p = verdicts["p_looks"].astype("float64").fillna(1.0).where(verdicts["outcome"] != "void", 1.0)
    p = p.where(~verdicts["note"].isin([looks.STOPPED, CHANGED]), 1.0)
    verdicts = verdicts.assign(uncorrected=verdicts["outcome"], adjusted_p=np.nan)
    for tier, adjust in (("primary", holm), ("secondary", false_discovery_control)):
        if (of_tier := verdicts["tier"] == tier).any():
            verdicts.loc[of_tier, "adjusted_p"] = adjust(p[of_tier].to_numpy())
    secondary = verdicts["tier"] == "secondary"
    decided = secondary & verdicts["outcome"].isin(["supported", "not supported"])
    lost = decided & (verdicts["adjusted_p"] > FALSE_DISCOVERIES)
    number = count_phrase(int(secondary.sum()), "claim")
    verdicts.loc[lost, "outcome"] = "inconclusive"
    verdicts.loc[lost, "note"] = f"decided before the correction for {number}"
    return verdicts
