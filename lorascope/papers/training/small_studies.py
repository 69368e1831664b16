"""Small version of a paper's study: claims on planted teachers with a few seeds, and the motive with fewer steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.charts.chart import Drawable, Panels
from lorascope.experiments.grid import parse_seeds
from lorascope.files.printable import count_phrase
from lorascope.files.seals import require_own
from lorascope.files.text_layout import format_frame
from lorascope.files.typed_json import to_json_rows
from lorascope.pages import page
from lorascope.pages.page import Section
from lorascope.pages.report_figure import ReportFigure
from lorascope.papers import hydralora_factors, lisa, neft
from lorascope.papers.figures.neuron_hits import neuron_hits
from lorascope.papers.figures.pair_gaps import pair_gaps
from lorascope.papers.judging import kept_study, registered_study
from lorascope.papers.judging.data_folder import STUDY_RUNS
from lorascope.papers.judging.kept_study import FIRST_SEED, StudyEvidence
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.registry import COMPARISONS
from lorascope.papers.training import study_training
from lorascope.papers.training.study_seeds import (
    compare_effects,
    require_usable,
    run_table,
    train_jobs,
    usable_rates,
)
from lorascope.papers.training.study_training import StudyJob, require_registered_arm

PLANTED = ("pair", "neurons")
"""First part of the ids of claims whose arms are cheap enough for a small version."""


@dataclass(frozen=True, eq=False)
class SmallStudy:
    """Result of a paper's small version, which Jupyter shows.

    Parameters
    ----------
    paper : Paper
        The paper.
    path : Path
        The page.
    table : DataFrame
        Effects of the paper's claims on planted teachers: ``claim, effect, yours, kept, low, high``, with the mean over
        your seeds, and the mean and 95% interval of the kept ones.
    runs : DataFrame
        ``arm, seed, steps, learned``: one row per run.
    figures : mapping name -> chart
        Figures of the runs.
    """

    paper: PaperStudy
    path: Path
    table: pd.DataFrame
    runs: pd.DataFrame
    figures: Mapping[str, Drawable]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values; numbers that do not exist are None."""
        tables = {"effects": to_json_rows(self.table), "runs": to_json_rows(self.runs)}
        return {"paper": self.paper.name, "report": str(self.path), **tables}

    def __repr__(self) -> str:
        effects = self.table.round(2).dropna(axis=1, how="all")
        unlearned = int((self.runs["learned"] == "no").sum())
        runs = f"{count_phrase(len(self.runs), 'run')}, {unlearned} did not learn."
        return "\n".join([self.paper.source, format_frame(effects), runs])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.table.round(2), *self.figures.values())


def run(paper: PaperStudy, seeds: int | Sequence[int], out: str | Path, progress: bool = True) -> SmallStudy:
    """Train the small version of a paper's study; see ``PaperStudy.run``."""
    numbers = parse_seeds(seeds)
    # As those of the evidence, so that a kept run with the same seed is the same run.
    if isinstance(seeds, int):
        numbers = [FIRST_SEED + number for number in numbers]
    path, data = Path(out) / f"{paper.name.lower()}.html", registered_study.STUDY_FILE.parent
    require_usable(Path(out), data)
    require_own(path)
    registration, evidence = registered_study.read(registered_study.STUDY_FILE), kept_study.read(data / STUDY_RUNS)
    ids = claims_of(paper, registration)
    rates = usable_rates(registration, evidence)
    jobs = small_jobs(paper, ids, numbers, registration, rates)
    trained = train_jobs(jobs, Path(out) / "runs", rates, progress)
    effects = compare_effects(trained, ids, registration, evidence)
    runs = run_table(trained)[["arm", "seed", "steps", "learned"]]
    runs["learned"] = runs["learned"].map({True: "yes", False: "no"})
    study = SmallStudy(paper, path, effects, runs, draw(trained, ids, registration, small_note(paper, numbers)))
    section = Section(
        "small",
        paper.question,
        source=paper.source,
        tables={"Effects (method minus control) of your seeds and of the kept ones": effects, "Runs": runs},
        figures=[ReportFigure(figure) for figure in study.figures.values()],
    )
    lead = f"Arms of the claims on planted teachers as registered; {count_phrase(len(numbers), 'seed')}."
    page.write(path, f"{paper.name}, small version", lead, [section])
    return study


def claims_of(paper: PaperStudy, registration: StudyRegistration) -> list[str]:
    """Return the ids of a paper's claims on planted teachers."""
    return [
        id
        for id, claim in registration.claims.items()
        if claim.paper.arxiv == paper.arxiv and id.partition(".")[0] in PLANTED
    ]


def small_jobs(
    paper: PaperStudy,
    ids: Iterable[str],
    seeds: Iterable[int],
    registration: StudyRegistration,
    rates: Mapping[str, float],
) -> list[StudyJob]:
    """Return the runs of claims, and those of the paper's motive with fewer steps.

    Raises
    ------
    ValueError
        An arm differs from the registered one.
    """
    short = dict.fromkeys(paper.motive, paper.changes)
    labels = dict.fromkeys(label for id in ids for label in sorted(COMPARISONS[id].arms()))
    # All of them, before any is trained.
    for label in (*short, *labels):
        require_registered_arm(label, registration)
    jobs = []
    for seed in seeds:
        jobs += [StudyJob(label, seed, "judged", rates[label], changes) for label, changes in short.items()]
        jobs += [StudyJob(label, seed, "judged", rates[label]) for label in labels]
    return jobs


def small_note(paper: PaperStudy, seeds: Sequence[int]) -> str:
    """Return what the caption of a figure of a small version begins with."""
    note = f"Small version, {count_phrase(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
    if paper.motive:
        arm: Any = study_training.arms_by_label()[paper.motive[0]]
        note += f", {paper.changes['steps']} of {arm.settings['steps']} steps"
    return f"{note}. "


def draw(trained: StudyEvidence, ids: Sequence[str], registration: StudyRegistration, note: str) -> dict[str, Drawable]:
    """Draw the figures of a paper that its runs have the tables for."""
    # The motive first, as on the page of the paper.
    figures: dict[str, Drawable] = {}
    tables = trained.tables
    if "norms" in tables:
        figures["norms"] = add_note(lisa.norms_figure(tables["norms"]), note)
    if "nearest" in tables:
        figures["factors"] = add_note(hydralora_factors.factors_figure(tables["nearest"]), note)
    if "neurons" in tables:
        figures["neurons"] = neuron_hits(tables["neurons"], neft.hit_rate, neft.AT_RANDOM.value)
    pairs = {id: registration.claims[id] for id in ids if id.startswith("pair.")}
    figures["pairs"] = pair_gaps(replace(registration, claims=pairs), trained)
    return figures


def add_note(drawable: Drawable, note: str) -> Drawable:
    """Put a note before the caption of a figure."""
    (first, *others), *rows = drawable.rows()
    return Panels(((replace(first, caption=note + first.caption), *others), *rows))
