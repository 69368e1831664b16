"""Reproduction of the study on this machine: both motives with few steps, one planted pair again, and a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lorascope.files.data_folder import DATA
from lorascope.files.seals import require_own
from lorascope.files.typed_json import to_json_rows
from lorascope.pages import page
from lorascope.pages.page import Section
from lorascope.pages.report_figure import ReportFigure
from lorascope.papers.figures.study_images import StudyFigure
from lorascope.papers.judging import data_folder, kept_study, registered_study
from lorascope.papers.judging.beliefs import format_with_interval, shown_word
from lorascope.papers.judging.data_folder import STUDY_RUNS
from lorascope.papers.judging.kept_study import FIRST_SEED, StudyEvidence
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.study_summary import COLUMNS, LINE, SENTENCE, Summary, format_words
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.registry import PAPERS
from lorascope.papers.study_figures import ROWS, draw_rows, read_data, variant_rows
from lorascope.papers.training.small_studies import MOTIVE_FIGURES, draw, show_learned, small_jobs
from lorascope.papers.training.study_retraining import retrain_run
from lorascope.papers.training.study_seeds import require_usable, run_table, train_jobs, usable_rates
from lorascope.papers.training.study_training import machine

REPORT = "report.html"
MOTIVES = (PAPERS["lisa"], PAPERS["hydralora"])
_SCORES = ("neuron-scores", "allocations")
"""Names of the figures of neurons' scores and of allocated ranks."""
_MOTIVES = (
    "LISA: norms by layer of full fine-tuning, LoRA and LISA. HydraLoRA: A's and B's of LoRAs on several tasks, with "
    "separate and with shared initial A's. The small versions are of this machine, with one seed and fewer steps."
)
PAIR = "pair.neft"
"""Claim whose arms are trained again; one of the cheapest."""


class Retrained(NamedTuple):
    """A run that was trained again: its label, the points of the gap that it closed before and now, and a word."""

    arm: str
    kept: float | None
    yours: float
    comparison: str

    def __str__(self) -> str:
        values = f"yours {self.yours:.1f}, {self.comparison}"
        if self.kept is not None:
            values = f"kept {self.kept:.1f}, {values}"
        line = f"Trained again: {self.arm}, seed {FIRST_SEED}: {values}"
        return textwrap.shorten(line, LINE, placeholder=" ...")


@dataclass(frozen=True)
class Reproduction:
    """Result of ``reproduce``.

    Parameters
    ----------
    path : Path
        The report.
    summary : Summary
        Kept results.
    retrained : list of Retrained
        Runs that were trained again, next to the kept ones.
    runs : DataFrame
        ``arm, seed, steps, learned``: all runs that were trained.
    """

    path: Path
    summary: Summary
    retrained: list[Retrained]
    runs: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values; numbers that do not exist are None."""
        return {
            "report": str(self.path), "papers": to_json_rows(self.summary.table), "words": dict(self.summary.words),
            "note": self.summary.note, "retrained": [run._asdict() for run in self.retrained],
            "runs": to_json_rows(self.runs),
        }  # fmt: skip


def reproduce(out: str | Path, summary: Summary, data: Path = DATA, progress: bool = True) -> Reproduction:
    """Train small versions of both motives and the arms of one claim again, and report them with the kept results.

    Parameters
    ----------
    out : path
        Output folder. Runs are stored in ``out/runs``, where finished runs are found and interrupted ones resume.
    summary : Summary
        Summary of the kept results.
    data : path
        Folder of the registration and the evidence.
    progress : bool
        Whether to show a progress bar. Default True.

    Raises
    ------
    FileExistsError
        ``out`` has a ``report.html`` that lorascope did not write.
    ValueError
        ``out`` is a file or in ``data``, or an arm differs from the registered one.
    """
    path = Path(out) / REPORT
    require_usable(Path(out), data)
    require_own(path)
    registration, evidence = registered_study.read(data / "registered-2.toml"), kept_study.read(data / STUDY_RUNS)
    rates = usable_rates(registration, evidence)
    jobs = []
    for paper in MOTIVES:
        jobs += small_jobs(paper, [], [FIRST_SEED], registration, rates)
    jobs += small_jobs(PAPERS["neft"], [PAIR], [FIRST_SEED], registration, rates)
    trained = train_jobs(jobs, Path(out) / "runs", rates, progress)
    retrained = []
    for arm in registration.claims[PAIR].for_arms:
        retrained.append(_train_again(arm, trained, evidence, Path(out) / "runs", rates))
    result = Reproduction(path, summary, retrained, show_learned(run_table(trained)))
    title = "Nine methods, and what holds on small models"
    lead = "Results of kept runs, and what this machine has trained just now."
    page.write(path, title, lead, list(_sections(result, trained, registration, data)), _facts())
    return result


def _train_again(
    arm: str, trained: StudyEvidence, evidence: StudyEvidence, out: Path, rates: dict[str, float]
) -> Retrained:
    """Compare a trained run with the kept one, which it only reads again because it is finished."""
    if not evidence.has(arm, FIRST_SEED):
        return Retrained(arm, None, trained.closed(arm, FIRST_SEED), "no kept run yet")
    run = retrain_run(evidence, arm, FIRST_SEED, out, rates)
    # The rest names what differs between the machines.
    rule = run.rule.partition(" (")[0]
    return Retrained(arm, run.stored.value, run.yours.value, f"{rule}: {run.outcome}")


def _facts() -> dict[str, str]:
    """Return the facts in the header of the report."""
    facts = {"Written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    for name, value in machine().items():
        if value != "":
            facts[name.capitalize()] = str(value)
    return facts


def _sections(
    result: Reproduction, trained: StudyEvidence, registration: StudyRegistration, data: Path
) -> Iterator[Section]:
    """Yield the sections of the report: motives, scores and ranks, results, the trained pair, a section per paper."""
    figures: dict[str, StudyFigure] = {}
    tables, notes = {}, [result.summary.note]
    if not result.summary.note:
        contents = read_data(data)
        figures = draw_rows(contents, [*ROWS, *variant_rows()])
        tables["Nine papers"] = result.summary.table.rename(columns={**COLUMNS, "belief": SENTENCE})
        notes = [format_words(result.summary)]
    small = draw(trained, [PAIR], registration)
    motives = []
    for name in MOTIVE_FIGURES:
        motives += [*_take(figures, name), *_take(small, name)]
    yield Section("motives", "Two motives", _MOTIVES, figures=motives)
    if scores := _take(figures, *_SCORES):
        yield Section("scores", "Neurons and ranks", figures=scores)
    if forest := _take(figures, "forest"):
        yield Section("results", "Results", figures=forest)
    yield Section("papers", "What we now believe", tables=tables, notes=notes)
    pairs = [name for name in small if name.startswith("pairs-")]
    yield Section(
        "again",
        "One pair, trained again",
        registration.claims[PAIR].sentence,
        tables={"Points of the gap closed": pd.DataFrame(result.retrained)},
        figures=_take(small, *pairs, "losses"),
    )
    if not result.summary.note:
        yield from _paper_sections(figures, registration, contents.results)
    yield Section("runs", "Runs of this machine", tables={"Runs": result.runs}, folded=True)


def _take(figures: dict[str, StudyFigure], *names: str) -> list[ReportFigure]:
    """Remove figures by name, so that no other section shows them, and return them for the report."""
    taken = [figures.pop(name) for name in names if name in figures]
    return [ReportFigure(figure.chart, title=figure.alt) for figure in taken]


def _paper_sections(
    figures: dict[str, StudyFigure], registration: StudyRegistration, results: pd.DataFrame
) -> Iterator[Section]:
    """Yield a folded section per paper: its claims, and the figures that no other section shows."""
    for name in data_folder.PAPERS:
        paper = PAPERS[name.lower()]
        names = [name for name, figure in figures.items() if figure.heading == paper.name]
        yield Section(
            paper.name.lower(),
            paper.name,
            paper.question,
            paper.source,
            tables={"Claims": claim_table(paper, registration, results)},
            figures=_take(figures, *names),
            folded=True,
        )


def claim_table(paper: PaperStudy, registration: StudyRegistration, results: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the claims of a paper as texts: sentence, printed gain, effects at both truths, word and seeds."""
    by_claim: dict[Any, Any] = results.set_index("claim").to_dict("index")
    rows = []
    for claim in registration.claims.values():
        if claim.paper.arxiv != paper.arxiv:
            continue
        result, unit = by_claim[claim.id], claim.rule.unit
        printed = claim.paper.printed
        if printed is not None:
            printed = f"{printed} {claim.paper.printed_unit}".strip()
        rows.append(
            {
                "claim": claim.sentence,
                "printed": printed or "",
                "effect [95%]": format_with_interval(result, unit),
                "other truth": format_with_interval(result, unit, "against_"),
                "unit": unit,
                "word": shown_word(result),
                "seeds": f"{result['n']:g} of {claim.rule.seeds}",
            }
        )
    return pd.DataFrame(rows)
