"""A seed of your own of a claim of the second edition: its arms trained as for the evidence, next to the kept seeds."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lorascope.files.printable import printable
from lorascope.files.text_layout import format_frame
from lorascope.files.typed_json import to_json_rows
from lorascope.papers.judging import kept_study, registered_study
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
    study_run_line,
)


class SeedResult(NamedTuple):
    """Results of a claim for a seed.

    Parameters
    ----------
    arms : DataFrame
        ``arm, rate, score, unit, learned``: one row per arm.
    effects : DataFrame
        ``effect, yours, kept, low, high``: one row per effect, "for", "against" and "positive" (the positive control),
        with the mean and 95% interval of the kept seeds, which are NaN before all are trained.
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


def train_seed(
    id: str,
    seed: int,
    out: Path,
    registration: StudyRegistration,
    folder: Path = registered_study.STUDY_FILE.parent / "evidence-2",
) -> SeedResult:
    """Train the arms of a claim with one seed, and compute its effects.

    The rates are those chosen by the kept tuning runs; without them, the middle one of those registered.

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

    Raises
    ------
    ValueError
        ``out`` is in the folder of the registration, or an arm differs from the registered one.
    """
    if out.resolve().is_relative_to(folder.parent.resolve()):
        raise ValueError(f"--out must be outside {printable(folder.parent)}, which has the evidence, got {out}")
    evidence, comparison = kept_study.read(folder), COMPARISONS[id]
    rates: dict[str, float | None] = {}
    for label, choice in chosen_rates(registration, evidence.runs).items():
        tried = registration.arms[registration.arms[label].rate_of or label].rates
        rates[label] = choice.rate or tried[len(tried) // 2]
    labels = sorted(comparison.arms())
    # All of them, before any is trained.
    for label in labels:
        require_registered_arm(label, registration)
    arms = []
    # The statistics read kept runs, and only the user decides what to keep.
    with tempfile.TemporaryDirectory() as trained:
        for label in labels:
            run = finish_job(StudyJob(label, seed, "judged", rates[label] or 0.0), out, rates)
            kept_study.add_run(trained, run)
            print(study_run_line(run.rows), flush=True)
        of_seed = kept_study.read(trained)
    for label in labels:
        rows = of_seed.judged(label, seed)
        score = score_run(rows)
        learned = bool(are_learned(rows).all())
        arms.append({"arm": label, "rate": rates[label], "score": score.value, "unit": score.unit, "learned": learned})
    effects, summary = _compare_effects(id, seed, of_seed, evidence, registration)
    return SeedResult(pd.DataFrame(arms), effects, summary)


def _compare_effects(
    id: str, seed: int, of_seed: StudyEvidence, evidence: StudyEvidence, registration: StudyRegistration
) -> tuple[pd.DataFrame, str]:
    """Return the effects of a seed next to those of the kept seeds, and the words of the claim."""
    only = replace(registration, claims={id: registration.claims[id]})
    result = compute(only, COMPARISONS, evidence).results.iloc[0]
    rows = []
    for name, statistic in COMPARISONS[id].statistics().items():
        prefix = f"{name}_".removeprefix("for_")
        mean, low, high = (result[f"{prefix}{column}"] for column in ("effect", "low", "high"))
        effect = seed_effects(statistic(of_seed, [seed])).item()
        rows.append({"effect": name, "yours": effect, "kept": mean, "low": low, "high": high})
    words = ", ".join(filter(None, [result["word"], result["pair"], result["note"]]))
    unit = registration.claims[id].rule.unit
    effects = pd.DataFrame(rows).astype(dict.fromkeys(["yours", "kept", "low", "high"], "float64"))
    return effects, f"Effects are in {unit}. Kept: {result['n']} seeds; {words}."
