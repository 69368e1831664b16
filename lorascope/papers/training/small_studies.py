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
from lorascope.papers.figures.study_images import StudyFigure
from lorascope.papers.judging import kept_study, registered_study
from lorascope.papers.judging.data_folder import STUDY_RUNS
from lorascope.papers.judging.kept_study import FIRST_SEED, StudyEvidence
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.registry import COMPARISONS, PAPERS
from lorascope.papers.study_figures import ROWS, StudyData, draw_rows
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
MOTIVE_FIGURES = ("norms", "factors")
"""Figures of the papers' motives, in the order of the report."""


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
        Effects of the paper's claims on planted teachers: ``claim, effect, unit, yours, kept, low, high``, with the
        mean over your seeds, and the mean and 95% interval of the kept ones.
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
        effects = self.shown_effects()
        unlearned = int((self.runs["learned"] == "no").sum())
        runs = f"{count_phrase(len(self.runs), 'run')}, {unlearned} did not learn."
        return "\n".join([self.paper.source, format_frame(effects), runs])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.shown_effects(), *self.figures.values())

    def shown_effects(self) -> pd.DataFrame:
        """Return the effects as they are printed."""
        # Without kept seeds, there are no means and intervals to show.
        return self.table.round(2).dropna(axis=1, how="all")


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
    figures = draw(trained, ids, registration)
    charts = {name: figure.chart for name, figure in figures.items()}
    study = SmallStudy(paper, path, effects, show_learned(run_table(trained)), charts)
    sections = [
        Section(
            "effects",
            "Effects and figures",
            f"Method minus control on planted teachers, as registered; mean of {count_phrase(len(numbers), 'seed')}.",
            paper.source,
            tables={"Effects": study.shown_effects()},
            figures=[ReportFigure(figure.chart, title=figure.alt) for figure in figures.values()],
        ),
        Section("runs", "Runs", tables={"Runs": study.runs}, folded=True),
    ]
    page.write(path, f"{paper.name}, small version", paper.question, sections)
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
    labels = dict.fromkeys(label for id in ids for label in sorted(COMPARISONS[id].arms()))
    # All of them, before any is trained.
    for label in (*paper.motive, *labels):
        require_registered_arm(label, registration)
    jobs = []
    for seed in seeds:
        jobs += [StudyJob(label, seed, "judged", rates[label], changes) for label, changes in paper.motive.items()]
        jobs += [StudyJob(label, seed, "judged", rates[label]) for label in labels]
    return jobs


def small_note(runs: pd.DataFrame, motive: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the caption of a figure of a small version begins with: seeds, steps, and how many runs learned.

    Parameters
    ----------
    runs : DataFrame
        See ``run_table``.
    motive : mapping label -> settings
        Arms of the figure with the settings that differ from the registered ones; if empty, all other arms.
    """
    short = {label for paper in PAPERS.values() for label in paper.motive}
    of_figure = runs[runs["arm"].isin(motive or set(runs["arm"]) - short)]
    seeds = sorted(set(of_figure["seed"]))
    note = f"Small version: {count_phrase(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
    steps = []
    for label, changes in motive.items():
        arm: Any = study_training.arms_by_label()[label]
        steps.append(f"{changes['steps']} of {arm.settings['steps']}")
    if steps:
        note += f", {' and '.join(dict.fromkeys(steps))} steps"
    return f"{note}; {of_figure['learned'].sum()} of {count_phrase(len(of_figure), 'run')} learned. "


def draw(trained: StudyEvidence, ids: Sequence[str], registration: StudyRegistration) -> dict[str, StudyFigure]:
    """Draw the figures of the study that trained runs have the tables for, with the pairs among some claims."""
    pairs = {id: registration.claims[id] for id in ids if id.startswith("pair.")}
    nothing = pd.DataFrame(columns=["word"])
    contents = StudyData(replace(registration, claims=pairs), trained, nothing, nothing)
    # These show all methods; the pairs of a paper have a separate figure.
    rows = [row for row in ROWS if row.name not in ("forest", "pairs")]
    rows.sort(key=lambda row: row.name == "losses")
    runs, figures = run_table(trained), {}
    for name, figure in draw_rows(contents, rows).items():
        motive: Mapping[str, Mapping[str, Any]] = {}
        if name in MOTIVE_FIGURES:
            motive = PAPERS[figure.heading.lower()].motive
        (first, *others), *below = figure.chart.rows()
        first = replace(first, caption=small_note(runs, motive) + first.caption)
        figures[name] = StudyFigure(figure.heading, f"{figure.alt} (small version)", Panels(((first, *others), *below)))
    return figures


def show_learned(table: pd.DataFrame) -> pd.DataFrame:
    """Return ``arm, seed, steps, learned`` of trained runs, without scores: one seed of a short run decides nothing."""
    learned = table["learned"].map({True: "yes", False: "no"})
    return table[["arm", "seed", "steps"]].assign(learned=learned).sort_values(["arm", "seed"], ignore_index=True)
