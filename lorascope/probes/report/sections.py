"""Parts of the report, in order: header, claims, contents, and one section per probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lorascope.probes.base import Findings, Probe, ReportFigure
from lorascope.probes.claims import Verdict
from lorascope.probes.report.figures import embed
from lorascope.probes.report.html import Html, bullets, count, element, frame_table, join_distinct, json_data, pairs
from lorascope.probes.report.run_settings import model_name, settings
from lorascope.probes.report.verdicts import RULE, by_seed, claims_table, tally, too_few
from lorascope.runs.run import Run


@dataclass(frozen=True)
class StudySection:
    """A probe with its findings and its runs by arm."""

    probe: Probe
    findings: Findings
    arms: Mapping[str, Sequence[Run]]

    @property
    def anchor(self) -> str:
        """Id of the probe's section on the page."""
        return f"probe-{self.probe.name}"

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """Verdicts of the probe's claims."""
        return self.findings.verdicts


def head(title: str, studies: Sequence[StudySection], quick: bool, now: datetime) -> Html:
    """Build the header: title, number of claims by outcome, date, seeds, models, data and versions."""
    verdicts = [verdict for study in studies for verdict in study.verdicts]
    size = "quick settings, which test the pipeline and decide no claim" if quick else "full settings"
    lead = f"{count(len(studies), 'probe')}, {tally(verdicts)}. Run with {size}."
    facts = pairs(_study_facts(studies, now), "facts")
    return element("header", element("h1", title), element("p", lead, class_="lead"), facts)


def claims(studies: Sequence[StudySection]) -> Html:
    """Build the table of all claims, followed by the rule that judges them."""
    judged = [(verdict, study.anchor) for study in studies for verdict in study.verdicts]
    parts = (
        [claims_table(judged), element("p", RULE, class_="rule")] if judged else [element("p", "No claim was judged.")]
    )
    return element("section", element("h2", "Claims", id="claims"), *parts, aria_labelledby="claims")


def contents(studies: Sequence[StudySection]) -> Html:
    """Build the list of links to the probes."""
    links = [element("a", study.probe.title, href=f"#{study.anchor}") for study in studies]
    return element("nav", element("h2", "Probes", id="probes"), bullets(links), aria_labelledby="probes")


def section(study: StudySection, numbers: Iterator[int], folder: Path) -> Html:
    """Build the section of one probe: question, figures, tables, notes, settings.

    Parameters
    ----------
    study : StudySection
        Probe with its findings and runs.
    numbers : iterator of int
        Numbers for the figures, which are numbered across the page.
    folder : path
        Folder of the report.
    """
    probe, findings = study.probe, study.findings
    few = too_few(findings.verdicts)
    return element(
        "section",
        element("h2", probe.title, id=study.anchor),
        element("p", probe.question, class_="question"),
        element("p", probe.source, class_="source"),
        *([element("p", few, class_="few")] if few else []),
        *(_figure_section(shown, next(numbers)) for shown in findings.figures),
        *([by_seed(findings.verdicts)] if findings.verdicts else []),
        *(frame_table(caption, table) for caption, table in findings.tables.items()),
        *([element("h3", "Notes"), bullets(findings.notes)] if findings.notes else []),
        settings(study.arms, folder),
        aria_labelledby=study.anchor,
    )


def _figure_section(shown: ReportFigure, number: int) -> Html:
    """Build the element of a chart: title, chart, caption, reading and caveat."""
    chart = embed(shown.chart)
    name = f"Figure {number}: {chart.title}" if chart.title else f"Figure {number}"
    heights = "; ".join(f"--{screen}: {pixels}px" for screen, pixels in chart.heights.items())
    label = f"{name}. {chart.caption}"
    return element(
        "figure",
        element("h3", name),
        element("div", class_="chart", role="img", aria_label=label, style=heights),
        json_data({"figure": chart.figure, "changes": chart.changes}),
        element("figcaption", chart.caption),
        pairs({"How to read": shown.reads, "Caveat": shown.misleads}, "reading"),
    )


def _study_facts(studies: Sequence[StudySection], now: datetime) -> dict[str, str]:
    """Collect the facts of the header; a run that several probes share counts once."""
    runs = list({run.id: run for study in studies for found in study.arms.values() for run in found}.values())
    metas = [run.meta for run in runs]
    seeds = sorted({meta.seed for meta in metas if meta.seed is not None})
    seconds = sum(meta.total_seconds for meta in metas)
    versions = [", ".join(f"{name} {version}" for name, version in (meta.versions or {}).items()) for meta in metas]
    commits = [str(meta.commit)[:12] for meta in metas if meta.commit]
    facts = {
        "Written": f"{now:%Y-%m-%d %H:%M} UTC",
        "Runs": f"{count(len(runs), 'run')}, {seconds / 60:.0f} min of training",
        "Seeds": join_distinct(seeds),
        "Models": join_distinct(map(model_name, runs)),
        "Data": join_distinct(meta.task for meta in metas),
        "Device": join_distinct(str(meta.device) for meta in metas),
        "Versions": join_distinct(versions),
        "Commit": join_distinct(commits),
    }
    return {term: text for term, text in facts.items() if text}
