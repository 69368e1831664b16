"""Verification: everything that was derived from the runs is computed again and compared with what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.files.typed_json import parse_json, to_typed
from lorascope.files.whole_files import write_bytes
from lorascope.papers.judging import kept_runs
from lorascope.papers.judging.claims import format_effect
from lorascope.papers.judging.csv_tables import CLOSE, are_equal, compare_with_file, to_csv
from lorascope.papers.judging.evidence_manifest import full_manifest, kept_digests, parse_digests
from lorascope.papers.judging.kept_runs import BLOCK, Evidence
from lorascope.papers.judging.learning_rates import choice_of_arm, tuning_table
from lorascope.papers.judging.looks import STOPPED
from lorascope.papers.judging.registration import Registered, RegisteredArm, Registration, arm_hash
from lorascope.papers.judging.statistics import COURSE
from lorascope.papers.judging.verdicts import (
    CHANGED,
    VERDICT_COLUMNS,
    Pair,
    judge_all,
    judge_claim,
    name_machine,
    untrained_arms,
)

_HALF = 2e-3  # losses are kept in float16


@dataclass(frozen=True)
class Derived:
    """Results that verification computes again from the runs.

    Parameters
    ----------
    files : mapping name -> bytes
        Content of ``tuning.csv``, ``values.csv``, ``verdicts.csv`` and, if added, of files that follow from these.
    tuning, verdicts : DataFrame
        Two of the files as tables.
    machines : DataFrame
        ``claim, block, n, shown, outcome, differs``: claims on other machines than the one that judges them, and
        whether the outcome there is another one. Without runs of other machines it is empty.
    """

    files: Mapping[str, bytes]
    tuning: pd.DataFrame
    verdicts: pd.DataFrame
    machines: pd.DataFrame

    def with_file(self, name: str, table: pd.DataFrame) -> Derived:
        """Return these results with one more file."""
        return replace(self, files={**self.files, name: to_csv(table)})


def derive(evidence: Evidence, registration: Registration, pairs: Mapping[str, Pair]) -> Derived:
    """Compute what verification compares: chosen rates, values by seed and verdicts, from the runs.

    Parameters
    ----------
    evidence : Evidence
        All runs.
    registration : Registration
        Claims and arms.
    pairs : mapping id -> (Statistic, Statistic)
        Statistic and control of each judged claim.
    """
    grids = {arm.label: (arm.rates, arm.tuning_seeds) for arm in registration.arms.values() if len(arm.rates) > 1}
    judged = {id: claim for id, claim in registration.of_tier("primary", "secondary").items() if id in pairs}
    states = pd.Series({id: state_of_arms(id, registration, evidence) for id in judged}, dtype="object")
    changed = states.index[states == "changed"]
    verdicts, values = judge_all(judged, pairs, evidence, registration.arms, changed)
    verdicts = verdicts.assign(arms_state=states.to_list()).reindex(columns=list(VERDICT_COLUMNS))
    machines = _on_other_machines(judged, pairs, evidence, verdicts, registration.arms)
    tables = {"tuning.csv": tuning_table(evidence.runs, grids), "values.csv": values, "verdicts.csv": verdicts}
    files = {name: to_csv(table) for name, table in tables.items()}
    return Derived(files, tables["tuning.csv"], verdicts, machines)


def _on_other_machines(
    claims: Mapping[str, Registered],
    pairs: Mapping[str, Pair],
    evidence: Evidence,
    verdicts: pd.DataFrame,
    arms: Mapping[str, RegisteredArm],
) -> pd.DataFrame:
    """Judge the claims on the machines that do not judge them."""
    main_verdicts, rows = verdicts.set_index("claim"), []
    for block in evidence.blocks():
        runs, machine = evidence.in_block(block), name_machine(block)
        untrained = untrained_arms(runs, arms)
        for id, claim in claims.items():
            main = main_verdicts.loc[id]
            if main.get("block") == machine or untrained.keys() & set(claim.arms):
                continue
            if judged := judge_claim(claim, pairs[id], runs):
                verdict, (effect, low, high, n) = judged.verdict, judged.verdict.effect
                # An open claim may still end differently, so it does not differ yet.
                decided = STOPPED not in (verdict.note, main["note"])
                rows.append({
                    "claim": id, "block": machine, "n": n, "shown": format_effect(claim.claim, effect, low, high),
                    "outcome": verdict.outcome, "differs": decided and verdict.outcome != main["uncorrected"],
                })  # fmt: skip
    return pd.DataFrame(rows, columns=["claim", "block", "n", "shown", "outcome", "differs"])


def state_of_arms(claim: str, registration: Registration, evidence: Evidence) -> str:
    """Verify that the runs of a claim are as registered: return "registered", "changed", or "deviated" for good."""
    allowed: set[tuple[str, str]] = set()
    for deviation in registration.deviations:
        if deviation.claim in (claim, "*"):
            allowed |= {*deviation.what.arms.values()}
    hashes = evidence.judged.groupby("arm")["arm_hash"].agg(set)
    state = "registered"
    for label in registration.claims[claim].arms:
        arm = registration.arms.get(label)
        for used in hashes.get(label, set()) - ({arm.hash} if arm else set()):
            if arm is None or (arm.hash, used) not in allowed:
                return "changed"
            state = "deviated"
    return state


def write_derived(folder: Path, derived: Derived, registered: Path) -> None:
    """Write what is computed from the runs, which verification checks, and the manifest."""
    _write_files(folder, derived)
    write_bytes(folder / "MANIFEST", full_manifest(folder, registered).encode())


def rewrite_derived(folder: Path, derived: Derived, registered: Path) -> None:
    """Write what is computed from the runs and verified, but let an existing manifest keep the digests of other files.

    A changed run is therefore still found.
    """
    _write_files(folder, derived)
    old, new = kept_digests(folder), parse_digests(full_manifest(folder, registered))
    # Without a manifest, there is nothing to keep.
    digests = old | {path: new[path] for path in derived.files} if old else new
    paths = [*new, *sorted(old.keys() - new.keys())]
    text = "".join(f"{digests[path]}  {path}\n" for path in paths if path in digests)
    write_bytes(folder / "MANIFEST", text.encode())


def _write_files(folder: Path, derived: Derived) -> None:
    for name, content in derived.files.items():
        write_bytes(folder / name, content)


def verify(
    folder: Path,
    registered: Path,
    registration: Registration,
    pairs: Mapping[str, Pair],
    code: Callable[[str], str],
    evidence: Evidence | None = None,
    derived: Derived | None = None,
) -> list[str]:
    """Verify all that is derived from the runs by computing it again; return one line for each difference.

    Parameters
    ----------
    folder : path
        Folder of evidence.
    registered : path
        File of the registration, whose digest the manifest has.
    registration : Registration
        Its content.
    pairs : mapping id -> (Statistic, Statistic)
        Statistic and control of each judged claim.
    code : callable
        ``code(id)`` returns the hash of the code of a claim.
    evidence : Evidence or None
        Content of the folder; None to read it.
    derived : Derived or None
        What follows from it; None to compute it.

    Returns
    -------
    list of str
        One line per difference: the place, what is kept and what was recomputed. Empty if all agree.
    """
    evidence = evidence or kept_runs.read(folder)
    derived = derived or derive(evidence, registration, pairs)
    return [
        *_check_manifest(folder, registered),
        *_check_files(folder, evidence),
        *_check_scores(evidence),
        *_check_arms(evidence, registration),
        *_check_rates(evidence, registration),
        *_check_seeds(evidence, registration),
        *_check_registration(registration, pairs, code, derived),
        *(line for name, content in derived.files.items() for line in compare_with_file(folder / name, content)),
    ]


def _check_manifest(folder: Path, registered: Path) -> Iterator[str]:
    old, new = kept_digests(folder), parse_digests(full_manifest(folder, registered))
    for link in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        yield f"{link.relative_to(folder).as_posix()}: a symbolic link, whose target is not kept"
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            yield f"MANIFEST: {path}: kept {_short(old.get(path))}, recomputed {_short(new.get(path))}"


def _check_files(folder: Path, evidence: Evidence) -> Iterator[str]:
    """Check that no run was removed from the table of runs while its predictions and tables are kept."""
    ids = set(evidence.runs["run"])
    for path in sorted([*folder.glob("predictions/*.npz"), *folder.glob("kept/*/*.parquet")]):
        if path.stem not in ids:
            yield f"{path.relative_to(folder).as_posix()}: not a run of runs.csv"


def _rows(table: pd.DataFrame) -> Iterable[Any]:
    return table.itertuples()


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "no such file"


def _check_scores(evidence: Evidence) -> Iterator[str]:
    """Compare accuracies and losses with the predictions that they are means of."""
    counts, courses = evidence.rows.groupby("task_hash")["row"].nunique(), evidence.kept.get(COURSE, {})
    for row in _rows(evidence.runs):
        margins, losses = evidence.margins.get(row.run), evidence.nll.get(row.run)
        expected = counts.get(row.task_hash, 0)
        for name, scores in (("margin", margins), ("nll", losses)):
            if scores is not None and len(scores) != expected:
                yield f"predictions/{row.run}.npz: rows of {name}: kept {len(scores)}, expected {expected}"
        if margins is not None and not np.isclose(row.test_metric, (margins > 0).mean(), rtol=CLOSE, atol=0):
            yield f"runs.csv: {row.run}: test_metric: kept {row.test_metric}, recomputed {(margins > 0).mean()}"
        if losses is not None and not np.isclose(row.test_loss, losses.mean(dtype="f8"), rtol=_HALF, atol=_HALF):
            yield f"runs.csv: {row.run}: test_loss: kept {row.test_loss}, recomputed {losses.mean(dtype='f8')}"
        yield from _check_perplexity(row)
        if row.run in courses:
            yield from _check_course(row, courses[row.run])


def _check_perplexity(row: Any) -> Iterator[str]:
    """Compare metrics with losses where the metric is a perplexity, which has no chance level."""
    for split in ("validation", "test"):
        metric, loss = getattr(row, f"{split}_metric"), getattr(row, f"{split}_loss")
        if np.isnan(row.validation_chance) and loss < np.inf and not np.isclose(metric, np.exp(loss), rtol=CLOSE):
            expected = float(np.exp(loss))
            yield f"runs.csv: {row.run}: {split}_metric: kept {metric!r}, exp({split}_loss) gives {expected!r}"


def _check_course(row: Any, course: pd.DataFrame) -> Iterator[str]:
    """Compare the final accuracy and the steps of a run with its kept course, whose best accuracy may be earlier."""
    try:
        best, epochs = (float(course[name].iloc[0]) for name in ("best_accuracy", "epochs"))
    except (LookupError, TypeError, ValueError):
        yield f"kept/{COURSE}/{row.run}.parquet: its row must have the numbers best_accuracy and epochs"
        return
    if row.test_metric > best:
        yield f"runs.csv: {row.run}: test_metric: kept {row.test_metric}, above best_accuracy of kept/{COURSE}: {best}"
    if row.steps != epochs:
        yield f"runs.csv: {row.run}: steps: kept {row.steps:g}, epochs of kept/{COURSE}: {epochs:g}"


def _parse(row: Any, column: str) -> dict[str, Any]:
    source = f"runs.csv: {row.run}: {column}"
    return to_typed(parse_json(getattr(row, column), source), dict[str, Any], source)


def _check_arms(evidence: Evidence, registration: Registration) -> Iterator[str]:
    """Compare the hash of each run's arm with its method and settings, and these with its rate."""
    for row in _rows(evidence.runs[evidence.runs["role"] != "baseline"]):
        arm = registration.arms.get(row.arm)
        if arm is None:
            yield f"runs.csv: {row.run}: arm {row.arm!r} is not registered"
            continue
        try:
            method, settings = _parse(row, "method"), _parse(row, "settings")
        except ValueError as error:
            yield str(error)
            continue
        recomputed = arm_hash(arm, method, settings, row.task_hash, row.w0)
        if row.steps != settings.get("steps", row.steps):
            yield f"runs.csv: {row.run}: steps: kept {row.steps:g}, the settings give {settings['steps']!r}"
        if row.arm_hash != recomputed:
            yield f"runs.csv: {row.run}: arm_hash: kept {row.arm_hash}, recomputed {recomputed}"
        for name, ratio in arm.fields.items():
            if not are_equal(str(method.get(name)), str(row.rate * ratio)):
                yield f"runs.csv: {row.run}: {name}: kept {method.get(name)!r}, the rate gives {row.rate * ratio!r}"


def _check_rates(evidence: Evidence, registration: Registration) -> Iterator[str]:
    """Check that each judged run has the rate that the tuning chose."""
    for row in _rows(evidence.judged):
        arm = registration.arms.get(row.arm)
        if arm is None or not arm.fields:
            continue
        tuned, choice = choice_of_arm(registration, evidence.runs, row.arm)
        if choice.rate is None:
            yield f"runs.csv: {row.run}: judged before a rate of {tuned.label!r} was chosen"
        elif not np.isclose(row.rate, choice.rate, rtol=CLOSE, atol=0):
            yield f"runs.csv: {row.run}: rate: kept {row.rate!r}, chosen {choice.rate!r}"


def _check_seeds(evidence: Evidence, registration: Registration) -> Iterator[str]:
    """Check that no judged seed is missing, and that none was used for tuning."""
    first = registration.first_seed
    for (arm, *block), runs in evidence.judged.groupby(["arm", *BLOCK]):
        seeds = set(runs["seed"])
        if (missing := next(seed for seed in count(first) if seed not in seeds)) < max(seeds):
            yield f"runs.csv: arm {arm!r} on {' / '.join(map(str, block))}: seed {missing} is missing"
        tuning: RegisteredArm | None = registration.arms.get(str(arm))
        if tuning:
            for seed in sorted(seeds & set(tuning.tuning_seeds)):
                yield f"runs.csv: arm {arm!r}: seed {seed} is a tuning seed and must not be judged"
        for seed in sorted(seed for seed in seeds if seed < first):
            yield f"runs.csv: arm {arm!r}: seed {seed} is below the first judged seed {first}"


def _check_registration(
    registration: Registration, pairs: Mapping[str, Pair], code: Callable[[str], str], derived: Derived
) -> Iterator[str]:
    judged = registration.of_tier("primary", "secondary")
    for id in sorted(judged.keys() ^ pairs.keys()):
        yield f"registered.toml: claim {id}: {'no probe computes it' if id in judged else 'it is not registered'}"
    for id in sorted(judged.keys() & pairs.keys()):
        claim = judged[id]
        used = pairs[id][0].arms() | pairs[id][1].arms()
        if used != set(claim.arms):
            yield f"registered.toml: claim {id}: arms: kept {sorted(claim.arms)}, the code reads {sorted(used)}"
        if claim.code != code(id):
            yield f"registered.toml: claim {id}: code: kept {claim.code or 'no hash'}, recomputed {code(id)}"
    for row in _rows(derived.verdicts):
        if row.arms_state == "changed":
            yield f"registered.toml: claim {row.claim}: {CHANGED}"
