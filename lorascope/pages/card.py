"""Contents of a report card: what adapters and runs are, what was found in them, and what was not checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import BytesIO
from typing import Any, get_args

import pandas as pd

from lorascope import __version__
from lorascope.charts.chart import Chart
from lorascope.charts.stored_chart import pack, unpack
from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes import Finding
from lorascope.diagnosis.causes.finding import Severity
from lorascope.diagnosis.doctor import SKIP_REASONS, findings, skipped_checks
from lorascope.diagnosis.inspection import Inspection, inspect, json_values
from lorascope.diagnosis.pair_comparison import compare_inspections, distinct_labels
from lorascope.files.parquet_tables import read_table
from lorascope.files.printable import printable
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.plots.figure_registry import FIGURES, Topic, available
from lorascope.runs.result import Result

MAX_ROWS = 2**18
"""Maximum rows of a table of a card: enough for two adapters with 100,000 modules each."""
_SEVERITIES, _TOPICS = get_args(Severity), get_args(Topic)


@dataclass(frozen=True)
class Card:
    """Contents of a report card as JSON values and tables, from which its pages are built.

    Parameters
    ----------
    document : dict
        JSON values: versions, subjects (facts, findings, what was not checked), and figures.
    parquet : dict
        Name of a table -> the table as a Parquet file.
    """

    document: dict[str, Any]
    parquet: dict[str, bytes]

    @property
    def subjects(self) -> list[dict[str, Any]]:
        """Return the adapters and runs: ``label, kind, facts, findings, unchecked, notes``."""
        return list(self.document["subjects"])

    @property
    def title(self) -> str:
        """Labels of the subjects."""
        return ", ".join(subject["label"] for subject in self.subjects)

    def table(self, name: str) -> pd.DataFrame:
        """Return a table: "modules", "roles" or, for several subjects on one model, "pairs"."""
        return read_table(BytesIO(self.parquet[name]), f"the table {name!r}", MAX_ROWS)

    def figures(self) -> Iterator[ReportFigure]:
        """Yield the figures."""
        for stored in self.document["figures"]:
            chart = unpack(stored["chart"], [self.table(name) for name in stored["tables"]])
            yield ReportFigure(chart, stored["reads"], stored["misleads"])

    def without(self, figures: Mapping[str, str]) -> Card:
        """Return the card without some figures, with the reasons for their absence by name."""
        kept = [each for each in self.document["figures"] if each["name"] not in figures]
        gone = {name for each in self.document["figures"] if each["name"] in figures for name in each["tables"]}
        changed = {"figures": kept, "unseen": self.document["unseen"] | dict(figures)}
        return Card(self.document | changed, {name: file for name, file in self.parquet.items() if name not in gone})


def collect(runs: Sequence[Result], spectra: bool = False) -> Card:
    """Collect the card of adapters or runs; ``spectra`` also runs full SVDs."""
    inspections = [inspect(run, spectra) for run in runs]
    labels = distinct_labels(inspections)
    named = dict(zip(labels, inspections, strict=True))
    tables = {
        "modules": _join_tables({label: item.modules for label, item in named.items()}),
        "roles": _join_tables({label: item.roles() for label, item in named.items()}),
    }
    unseen: dict[str, str] = {}
    if len(runs) > 1:
        try:
            matrix = compare_inspections(inspections, spectra).matrix
            tables["pairs"] = matrix[matrix["one"] != matrix["other"]]
        except ValueError as error:  # they are adapters of different models
            unseen["comparison in pairs"] = printable(error)
    parquet = {name: _parquet(table) for name, table in tables.items()}
    figures: list[dict[str, Any]] = []
    for name, drawn in _draw({label: item.run for label, item in named.items()}, unseen):
        packed, own = pack(drawn.chart)
        files = {f"figure {len(figures) + 1}, table {n}": _parquet(table) for n, table in enumerate(own, start=1)}
        parquet |= files
        texts = {"reads": drawn.reads, "misleads": drawn.misleads}
        figures.append({"name": name, "chart": packed, "tables": [*files]} | texts)
    document = {
        "versions": installed_versions(),
        "subjects": [_subject(label, item) for label, item in named.items()],
        "figures": figures,
        "unseen": unseen,
    }
    return Card(json_values(document), parquet)


def installed_versions() -> dict[str, str]:
    """Return the versions on which the page of a card depends."""
    return {"lorascope": __version__, "plotly": version("plotly")}


def _subject(label: str, item: Inspection) -> dict[str, Any]:
    """Return what a card says about one adapter or run, except for its tables and figures."""
    case = Case(item.run)
    (_, kind), *facts = item.facts
    found = sorted(_unique([*findings(case), *item.details]), key=lambda each: _SEVERITIES.index(each.severity))
    return {
        "label": label,
        "kind": kind,
        "facts": dict(facts) | {"id": item.run.id},
        "findings": [each.to_json() for each in found],
        "unchecked": {SKIP_REASONS[missing]: names for missing, names in skipped_checks(case).items()},
        "notes": list(case.notes),
    }


def _unique(found: Sequence[Finding]) -> list[Finding]:
    """Return the findings without those that the doctor and the inspection share."""
    return list({(each.cause, each.message): each for each in found}.values())


def _draw(runs: dict[str, Result], unseen: dict[str, str]) -> Iterator[tuple[str, ReportFigure]]:
    """Yield the figures of the registry that show these runs; add the reasons for the others to ``unseen``."""
    lists = [dict(zip(table["figure"], table["missing"], strict=True)) for table in map(available, runs.values())]
    shown: Any = runs if len(runs) > 1 else next(iter(runs.values()))
    for name, figure in sorted(FIGURES.items(), key=lambda item: _TOPICS.index(item[1].topic)):
        if figure.runs > len(runs):
            continue
        if missing := next(filter(None, (each[name] for each in lists)), ""):
            unseen[name] = missing
            continue
        try:
            yield name, _without_label(draw(name, shown), runs)
        except ValueError as error:
            unseen[name] = printable(error)


def _without_label(drawn: ReportFigure, runs: dict[str, Result]) -> ReportFigure:
    """Remove the title of a single chart that is the label of the only run: the page has the name of the figure."""
    chart = drawn.chart
    if len(runs) == 1 and isinstance(chart, Chart) and chart.title in (printable(run.label) for run in runs.values()):
        return replace(drawn, chart=replace(chart, title=""))
    return drawn


def _join_tables(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return tables below each other, with the label in the first column if there are several."""
    if len(tables) == 1:
        return next(iter(tables.values()))
    return pd.concat([table.assign(adapter=label)[["adapter", *table.columns]] for label, table in tables.items()])


def _parquet(table: pd.DataFrame) -> bytes:
    file = BytesIO()
    table.reset_index(drop=True).to_parquet(file, compression="zstd")
    return file.getvalue()
