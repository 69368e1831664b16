"""Retraining of the second edition: judged runs drawn at random, trained again and compared with the kept ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.files.printable import count_phrase
from lorascope.papers.judging import kept_study
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.study_rates import chosen_rates
from lorascope.papers.training import study_training
from lorascope.papers.training.study_training import RunScore, StudyJob, finish_job, machine, score_run

SAME_MACHINE = 1e-6
"""Largest difference on the same machine, absolute, or relative to numbers above 1."""
MAX_DEVIATIONS = 3
"""Largest difference on another machine, in standard deviations of the arm's other judged seeds."""
_SCORES = ["gap", "base_gap", "accuracy", "majority", "loss", "first_loss"]
_LABELS = ["arm", "seed", "run"]


class RetrainedRun(NamedTuple):
    """Comparison of a kept run with the retrained one.

    Parameters
    ----------
    arm : str
        Label of the arm.
    seed : int
        Seed of the run.
    stored, yours : RunScore
        RunScore of the kept run, and of the retrained one.
    rule : str
        Rule of the comparison: "same processor", or another machine with what differs.
    outcome : str
        "equal", "within" three standard deviations, or "differs".
    differences : list of str
        One line per difference.
    """

    arm: str
    seed: int
    stored: RunScore
    yours: RunScore
    rule: str
    outcome: str
    differences: list[str]

    def __str__(self) -> str:
        values = f"stored {self.stored.value:.4g}, yours {self.yours}"
        return f"{self.arm}, seed {self.seed}: {values}, {self.rule}: {self.outcome}"


def retrain_study(
    folder: Path, out: Path, registration: StudyRegistration, number: int, seed: int | None = None
) -> list[str]:
    """Train judged runs again that are drawn at random, and compare them with the kept ones; print a line for each.

    On the same processor, with the same instructions, torch and threads, all numbers must agree within
    ``SAME_MACHINE``. Losses by step may differ by half a step of float16 more, since they are kept in it. On any
    other machine, the gap (or accuracy, or loss) must be within three standard deviations of the arm's other seeds.

    Parameters
    ----------
    folder : path
        Folder of the kept runs.
    out : path
        Empty folder for the run folders.
    registration : StudyRegistration
        Registered arms.
    number : int
        Number of runs; all if there are fewer.
    seed : int, optional
        Seed of the draw.

    Returns
    -------
    list of str
        One line per difference.
    """
    evidence = kept_study.read(folder)
    judged = evidence.runs[evidence.runs["role"] == "judged"].drop_duplicates("run")
    rates = {label: choice.rate for label, choice in chosen_rates(registration, evidence.runs).items()}
    lines = []
    sample = judged.sample(min(number, len(judged)), random_state=seed)
    for arm, run_seed in zip(sample["arm"], sample["seed"], strict=True):
        if arm not in study_training.arms_by_label():
            lines.append(f"{arm}, seed {run_seed}: cannot be trained again, because no module has this arm")
            continue
        retrained = retrain_run(evidence, arm, int(run_seed), out, rates)
        print(retrained, flush=True)
        lines += [f"{arm}, seed {run_seed}: {line}" for line in retrained.differences]
    return lines


def retrain_run(
    evidence: StudyEvidence, arm: str, seed: int, out: Path, rates: Mapping[str, float | None]
) -> RetrainedRun:
    """Train the judged run of an arm again, at its kept rate, and compare it; see ``retrain_study``."""
    rows = evidence.judged(arm, seed)
    finished = finish_job(StudyJob(arm, seed, "judged", float(rows["rate"].iloc[0])), out, rates)
    with tempfile.TemporaryDirectory() as folder:  # so that both are read from files
        kept_study.add_run(folder, finished)
        retrained = kept_study.read(folder)
    rule, outcome = "same processor", "equal"
    if changes := _machine_changes({**rows.iloc[0]}):
        lines, outcome = _compare_score(evidence, retrained, arm, seed)
        rule = f"another machine ({changes})"
    else:
        lines = list(_compare_all(evidence, retrained, finished.losses, arm, seed))
    if lines:
        outcome = "differs"
    return RetrainedRun(arm, seed, score_run(rows), score_run(finished.rows), rule, outcome, lines)


def _machine_changes(row: Mapping[str, Any]) -> str:
    """Return what differs between the machine of a kept run and this one; an unknown processor is another one."""
    changes = []
    for name, value in machine().items():
        # Two processors without a name need not be the same.
        if row[name] != value or value == "":
            changes.append(f"{name} {row[name] or 'unknown'}, here {value or 'unknown'}")
    return "; ".join(changes)


def _compare_score(evidence: StudyEvidence, retrained: StudyEvidence, arm: str, seed: int) -> tuple[list[str], str]:
    runs = evidence.runs
    last = runs[(runs["arm"] == arm) & (runs["role"] == "judged") & (runs["phase"] == "")]
    # A planted teacher has gaps, and text has accuracies and a loss.
    name = next((name for name in ("gap", "accuracy") if last[name].notna().any()), "loss")
    by_seed = last.groupby("seed")[name].mean()
    # A forged score among few seeds would make their deviation as large as it needs.
    other_seeds = by_seed.drop(seed)
    if len(other_seeds) < 2:
        return [], "not compared, because there are fewer than two other seeds"
    old, new, limit = by_seed[seed], retrained.of_phase(arm, seed)[name].mean(), MAX_DEVIATIONS * other_seeds.std()
    outcome = f"{name} within {MAX_DEVIATIONS} standard deviations of the other seeds, {limit:.3g}"
    if np.isclose(new, old, rtol=0, atol=limit, equal_nan=True):
        return [], outcome
    return [f"{name}: kept {old!r}, trained again {new!r}, not {outcome}"], outcome


def _compare_all(
    evidence: StudyEvidence, retrained: StudyEvidence, losses: pd.DataFrame, arm: str, seed: int
) -> Iterator[str]:
    """Yield one line for each score, table and test row that differs."""
    columns = ["phase", "task", "arm_hash", *_SCORES]
    yield from _table_differences(
        evidence.judged(arm, seed)[columns], retrained.judged(arm, seed)[columns], ["phase", "task"]
    )
    kept_run, new_run = evidence.run(arm, seed), retrained.run(arm, seed)
    old_tables, new_tables = _tables_of(evidence, kept_run), _tables_of(retrained, new_run)
    # Losses that were trained again are not rounded, which halves the largest difference.
    if len(losses):
        new_tables["losses"] = losses[["phase", "step", "loss"]]
    for name in sorted(old_tables.keys() ^ new_tables.keys()):
        yield f"{name}: only one of the kept and the retrained run has this table"
    for name in sorted(old_tables.keys() & new_tables.keys()):
        keys = {"losses": ["phase", "step"]}.get(name, [])
        for line in _table_differences(old_tables[name], new_tables[name], keys):
            yield f"{name}: {line}"
    old_bits, new_bits = (by_run.get(run) for by_run, run in ((evidence.right, kept_run), (retrained.right, new_run)))
    if old_bits is not None or new_bits is not None:
        if old_bits is None or new_bits is None or len(old_bits) != len(new_bits):
            yield "right: kept and retrained runs have different test rows"
        elif count := int(np.unpackbits(old_bits ^ new_bits).sum()):
            yield f"right: differs at {count} test rows"


def _tables_of(evidence: StudyEvidence, run: str) -> dict[str, pd.DataFrame]:
    tables = {}
    for name, table in evidence.tables.items():
        of_run = table[table["run"] == run].drop(columns=_LABELS)
        if len(of_run):
            tables[name] = of_run
    return tables


def _table_differences(old: pd.DataFrame, new: pd.DataFrame, keys: list[str]) -> Iterator[str]:
    """Yield one line for each column that differs; ``keys`` are the columns that name a row."""
    if list(old.columns) != list(new.columns) or len(old) != len(new):
        columns = [", ".join(map(str, table)) for table in (old, new)]
        yield f"kept {len(old)} rows of {columns[0]}, trained again {len(new)} of {columns[1]}"
        return
    for name in map(str, old):
        old_values, new_values = old[name].to_numpy(), new[name].to_numpy()
        if not pd.api.types.is_numeric_dtype(old[name]):
            is_close = old[name].astype("str").to_numpy() == new[name].astype("str").to_numpy()
        else:
            is_close = _are_close(old_values, new_values)
        if not is_close.all():
            row = int(np.argmin(is_close))
            position = "".join(f", {key} {old[key].iloc[row]}" for key in keys if old[key].iloc[row] != "")
            count = count_phrase(int((~is_close).sum()), "row")
            yield f"{name}: {count}{position}: kept {old_values[row]}, trained again {new_values[row]}"


def _are_close(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return where numbers agree, apart from the rounding of the kept ones to float16."""
    rounding: Any = 0.0
    if old.dtype == np.float16:
        with np.errstate(invalid="ignore", over="ignore"):
            # A number is rounded by at most half a step.
            rounding = np.nan_to_num(np.spacing(np.abs(old)).astype(np.float64) / 2)
            new = np.where(np.isinf(old) & (new.astype(np.float16) == old), old, new)
    values, expected = new.astype(np.float64), old.astype(np.float64)
    allowed = SAME_MACHINE * np.maximum(1.0, np.abs(np.nan_to_num(expected))) + rounding
    with np.errstate(invalid="ignore"):
        is_close = np.abs(values - expected) <= allowed
    return is_close | (values == expected) | (np.isnan(values) & np.isnan(expected))
