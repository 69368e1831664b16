"""Seeds of a user: arms of the second edition trained as for the evidence, and their effects next to the kept ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lorascope.experiments.sweep import run_jobs
from lorascope.files.printable import printable
from lorascope.files.text_layout import format_frame
from lorascope.files.typed_json import to_json_rows
from lorascope.papers.judging import kept_study
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.study_rates import chosen_rates
from lorascope.papers.judging.study_results import compute
from lorascope.papers.judging.study_statistics import are_learned, seed_effects
from lorascope.papers.registry import COMPARISONS
from lorascope.papers.training.study_training import (
    StudyJob,
    finish_job,
    require_registered_arm,
    score_run,
    to_sweep_job,
)
from lorascope.runs.run import Run
from lorascope.runs.writer import remove_states
from lorascope.training.progress import ProgressBar


class SeedResult(NamedTuple):
    """Results of a claim for a seed.

    Parameters
    ----------
    arms : DataFrame
        ``arm, rate, steps, score, unit, learned``: one row per arm.
    effects : DataFrame
        ``claim, effect, unit, yours, kept, low, high``: one row per effect, "for", "against" and "positive" (the
        positive control), with the mean and 95% interval of the kept seeds, which are NaN before all are trained.
    summary : str
        Number of kept seeds and the words of the claim.
    """

    arms: pd.DataFrame
    effects: pd.DataFrame
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values; numbers that do not exist are None."""
        return {"arms": to_json_rows(self.arms), "effects": to_json_rows(self.effects), "summary": self.summary}

    def __str__(self) -> str:
        # Without kept seeds, there are no means and intervals to print.
        tables = (self.arms.round({"score": 4}), self.effects.round(4).dropna(axis=1, how="all"))
        return "\n\n".join([*map(format_frame, tables), self.summary])


def usable_rates(registration: StudyRegistration, evidence: StudyEvidence) -> dict[str, float]:
    """Return the rate of every arm: that chosen by the kept tuning runs or, without them, the middle registered one."""
    rates = {}
    for label, choice in chosen_rates(registration, evidence.runs).items():
        tried = registration.arms[registration.arms[label].rate_of or label].rates
        rates[label] = choice.rate or tried[len(tried) // 2]
    return rates


def train_jobs(jobs: Sequence[StudyJob], out: Path, rates: Mapping[str, float], progress: bool = True) -> StudyEvidence:
    """Train runs in parallel, with a progress bar, and return what would be kept of them.

    Parameters
    ----------
    jobs : sequence of StudyJob
        Runs.
    out : path
        Folder of the run folders, where finished runs are found and interrupted ones resume.
    rates : mapping
        Rate of every arm.
    progress : bool
        Whether to show a bar, which counts the runs.
    """
    sweep_jobs = [sweep_job for job in jobs if (sweep_job := to_sweep_job(job, out)) is not None]
    with ProgressBar(total=len(sweep_jobs), desc="training", unit="run", disable=not progress) as bar:

        def finish(run: Run) -> None:
            bar.update()
            # Without adapters, the saved parameters are a copy of the model, which no kept table reads.
            if not run.ranks():
                remove_states(run)

        # A failed run fails again below, where its error is raised.
        run_jobs(sweep_jobs, progress=False, ended=finish)
    # The statistics read kept runs, and only the user decides what to keep.
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            kept_study.add_run(folder, finish_job(job, out, rates))
        return kept_study.read(folder)


def require_usable(out: Path, data: Path) -> None:
    """Raise a ValueError if a folder of runs is a file, or in the folder that has the evidence."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {printable(out)}")
    if out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out must be outside {printable(data)}, which has the evidence, got {out}")


def train_seed(
    id: str, seed: int, out: Path, registration: StudyRegistration, folder: Path, progress: bool = True
) -> SeedResult:
    """Train the arms of a claim with one seed, and compute its effects.

    Parameters
    ----------
    id : str
        A registered claim.
    seed : int
        Any seed.
    out : path
        Folder of the run folders, which resume if they were interrupted. Nothing else is written.
    registration : StudyRegistration
        Claims and arms.
    folder : path
        Folder of the kept runs; may be missing.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        ``out`` is in the folder of the registration, or an arm differs from the registered one.
    """
    require_usable(out, folder.parent)
    evidence = kept_study.read(folder)
    rates = usable_rates(registration, evidence)
    labels = sorted(COMPARISONS[id].arms())
    # All of them, before any is trained.
    for label in labels:
        require_registered_arm(label, registration)
    trained = train_jobs([StudyJob(label, seed, "judged", rates[label]) for label in labels], out, rates, progress)
    result = kept_result(id, registration, evidence)
    words = ", ".join(filter(None, [result["word"], result["pair"], result["note"]]))
    summary = f"Kept: {result['n']} seeds; {words}."
    arms = run_table(trained).drop(columns="seed")
    return SeedResult(arms, compare_effects(trained, [id], registration, evidence), summary)


def run_table(trained: StudyEvidence) -> pd.DataFrame:
    """Tabulate ``arm, seed, rate, steps, score, unit, learned``: one row per trained run."""
    steps, rows = trained.tables["losses"].value_counts("run"), []
    for run, of_run in trained.runs.groupby("run", sort=False):
        arm, seed, rate = of_run[["arm", "seed", "rate"]].iloc[0]
        # A run that diverged has no losses.
        rows.append((arm, seed, rate, steps.get(run, 0), *score_run(of_run), bool(are_learned(of_run).all())))
    return pd.DataFrame(rows, columns=["arm", "seed", "rate", "steps", "score", "unit", "learned"])


def kept_result(id: str, registration: StudyRegistration, evidence: StudyEvidence) -> pd.Series:
    """Return the row of a claim in the results of the kept runs."""
    only = replace(registration, claims={id: registration.claims[id]})
    return compute(only, COMPARISONS, evidence).results.iloc[0]


def compare_effects(
    trained: StudyEvidence, ids: Iterable[str], registration: StudyRegistration, evidence: StudyEvidence
) -> pd.DataFrame:
    """Tabulate effects of claims, mean over the trained seeds, next to those of the kept ones; see ``SeedResult``."""
    rows = []
    for id in ids:
        result = kept_result(id, registration, evidence)
        for name, statistic in COMPARISONS[id].statistics().items():
            prefix = f"{name}_".removeprefix("for_")
            mean, low, high = (result[f"{prefix}{column}"] for column in ("effect", "low", "high"))
            seeds = trained.seeds(min(statistic.arms()))
            effect = seed_effects(statistic(trained, seeds)).mean()
            row = {"claim": id, "effect": name, "unit": registration.claims[id].rule.unit, "yours": effect}
            rows.append(row | {"kept": mean, "low": low, "high": high})
    return pd.DataFrame(rows).astype(dict.fromkeys(["yours", "kept", "low", "high"], "float64"))
