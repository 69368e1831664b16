"""The parts of the report, in order: head, claims, contents, and a section a probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lorascope.probes.base import Exhibit, Findings, Probe
from lorascope.probes.claims import Verdict
from lorascope.probes.report.figures import embed
from lorascope.probes.report.html import Html, bullets, count, element, frame_table, join_distinct, json_data, pairs
from lorascope.probes.report.run_settings import model_name, settings
from lorascope.probes.report.verdicts import RULE, by_seed, claims_table, tally, too_few
from lorascope.runs.run import Run


@dataclass(frozen=True)
class StudySection:
    """A probe, what it found, and its runs by arm."""

    probe: Probe
    findings: Findings
    arms: Mapping[str, Sequence[Run]]

    @property
    def anchor(self) -> str:
        """Where the page tells of it."""
        return f"probe-{self.probe.name}"

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """The outcomes of its claims."""
        return self.findings.verdicts


def head(title: str, stories: Sequence[StudySection], quick: bool, now: datetime) -> Html:
    """What the report is about, from when, and what it was made with."""
    verdicts = [verdict for story in stories for verdict in story.verdicts]
    size = "quick settings, which show that everything works and decide little" if quick else "full settings"
    lead = f"{count(len(stories), 'probe')}, {tally(verdicts)}. Made with {size}."
    facts = pairs(_study_facts(stories, now), "facts")
    return element("header", element("h1", title), element("p", lead, class_="lead"), facts)


def claims(stories: Sequence[StudySection]) -> Html:
    """The table of all claims, and the rule that judged them."""
    judged = [(verdict, story.anchor) for story in stories for verdict in story.verdicts]
    told = [claims_table(judged), element("p", RULE, class_="rule")] if judged else [element("p", "None was judged.")]
    return element("section", element("h2", "Claims", id="claims"), *told, aria_labelledby="claims")


def contents(stories: Sequence[StudySection]) -> Html:
    """Links to the probes."""
    links = [element("a", story.probe.title, href=f"#{story.anchor}") for story in stories]
    return element("nav", element("h2", "Probes", id="probes"), bullets(links), aria_labelledby="probes")


def section(story: StudySection, numbers: Iterator[int], folder: Path) -> Html:
    """One probe: question, figures, tables, notes, settings.

    Parameters
    ----------
    story : Story
    numbers : iterator of int
        Gives the figures their numbers.
    folder : path
        The report's.
    """
    probe, findings = story.probe, story.findings
    few = too_few(findings.verdicts)
    return element(
        "section",
        element("h2", probe.title, id=story.anchor),
        element("p", probe.question, class_="question"),
        element("p", probe.source, class_="source"),
        *([element("p", few, class_="few")] if few else []),
        *(_figure_section(exhibit, next(numbers)) for exhibit in findings.exhibits),
        *([by_seed(findings.verdicts)] if findings.verdicts else []),
        *(frame_table(caption, table) for caption, table in findings.tables.items()),
        *([element("h3", "Notes"), bullets(findings.notes)] if findings.notes else []),
        settings(story.arms, folder),
        aria_labelledby=story.anchor,
    )


def _figure_section(exhibit: Exhibit, number: int) -> Html:
    """A chart with its title, its caption, and how to read it."""
    chart = embed(exhibit.chart)
    name = f"Figure {number}: {chart.title}" if chart.title else f"Figure {number}"
    heights = "; ".join(f"--{screen}: {pixels}px" for screen, pixels in chart.heights.items())
    label = f"{name}. {chart.caption}"
    return element(
        "figure",
        element("h3", name),
        element("div", class_="chart", role="img", aria_label=label, style=heights),
        json_data({"figure": chart.figure, "changes": chart.changes}),
        element("figcaption", chart.caption),
        pairs({"How to read it": exhibit.reads, "When it misleads": exhibit.misleads}, "reading"),
    )


def _study_facts(stories: Sequence[StudySection], now: datetime) -> dict[str, str]:
    """What was run, when, with what."""
    runs = list({run.id: run for story in stories for found in story.arms.values() for run in found}.values())
    metas = [run.meta for run in runs]
    seeds = sorted({meta["seed"] for meta in metas if meta["seed"] is not None})
    seconds = sum(meta.get("total_seconds", 0.0) for meta in metas)
    versions = [", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items()) for meta in metas]
    commits = [str(meta["commit"])[:12] for meta in metas if meta.get("commit")]
    told = {
        "Written": f"{now:%Y-%m-%d %H:%M} UTC",
        "Runs": f"{count(len(runs), 'run')}, {seconds / 60:.0f} min of training",
        "Seeds": join_distinct(seeds),
        "Models": join_distinct(map(model_name, runs)),
        "Data": join_distinct(meta["task"] for meta in metas),
        "Device": join_distinct(str(meta.get("device", "")) for meta in metas),
        "Versions": join_distinct(versions),
        "Commit": join_distinct(commits),
    }
    return {term: text for term, text in told.items() if text}
