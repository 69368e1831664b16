"""Contents of a report card: what adapters and runs are, what was found in them, and what was not checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import BytesIO
from typing import Any, get_args

import pandas as pd

from lorascope import __version__
from lorascope.analysis.advice import Advice
from lorascope.analysis.stored_measurements import stored_measurements
from lorascope.charts.chart import Chart, Drawable
from lorascope.charts.stored_chart import pack, unpack
from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes import Finding
from lorascope.diagnosis.causes.finding import Severity
from lorascope.diagnosis.doctor import SKIP_REASONS, find_faults, skipped_checks
from lorascope.diagnosis.inspection import Inspection, inspect
from lorascope.diagnosis.pair_comparison import compare_inspections, distinct_labels
from lorascope.files.parquet_tables import read_table
from lorascope.files.printable import printable
from lorascope.files.typed_json import json_values
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.plots.figure_registry import FIGURES, Topic, available
from lorascope.runs.result import Result

MAX_ROWS = 2**18
"""Maximum rows of a table of a card: enough for two adapters with 100,000 modules each."""
_MOST_VALUES = 20_000  # in a table of a figure; more do not fit into a page of 6 MiB
# Figures that show where update and rank of a run went, and then how well it trained; the others follow by topic.
_FIRST = (
    "update_norm_heat",
    "rank_allocation",
    "update_norm",
    "norm_over_steps",
    "training_curves",
    "accuracy_by_parameters",
)
# Findings and the other figures are sorted as these types list their values.
_SEVERITIES, _TOPICS = get_args(Severity), get_args(Topic)


@dataclass(frozen=True)
class Card:
    """Card of adapters or runs: JSON values and tables, from which its pages are built.

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
            chart = unpack(stored["chart"], list(map(self.table, stored["tables"])))
            yield ReportFigure(chart, stored["reads"], stored["misleads"])

    def without(self, figures: Mapping[str, str]) -> Card:
        """Return the card without some figures, with the reasons for their absence by name."""
        remaining, parquet = [], dict(self.parquet)
        for figure in self.document["figures"]:
            if figure["name"] not in figures:
                remaining.append(figure)
                continue
            for table in figure["tables"]:
                del parquet[table]
        changed = {"figures": remaining, "unseen": self.document["unseen"] | dict(figures)}
        return Card(self.document | changed, parquet)


def collect(runs: Sequence[Result], spectra: bool = False, advice: Advice | None = None) -> Card:
    """Collect the card of adapters or runs, with the advice on one; ``spectra`` also runs full SVDs.

    Raises
    ------
    ValueError
        The advice is on another run.
    """
    if advice is not None and [run.id for run in runs] != [advice.receipt.run]:
        raise ValueError(f"advice must be on the run of the card, got advice on {advice.receipt.run}")
    inspections = [inspect(run, spectra) for run in runs]
    labels = distinct_labels(inspections)
    modules, roles, subjects = {}, {}, []
    for label, inspection in zip(labels, inspections, strict=True):
        modules[label], roles[label] = inspection.modules, inspection.roles()
        subjects.append(_subject(label, inspection))
    tables = {"modules": _join_tables(modules), "roles": _join_tables(roles)}
    unseen: dict[str, str] = {}
    if len(runs) > 1:
        try:
            matrix = compare_inspections(inspections, spectra).matrix
            # The diagonal compares an adapter with itself.
            tables["pairs"] = matrix[matrix["one"] != matrix["other"]]
        except ValueError as error:  # they are adapters of different models
            unseen["comparison in pairs"] = printable(error)
    measured: list[dict[str, str]] = []
    for label, run in zip(labels, runs, strict=True):
        for measurement in stored_measurements(run):
            name = f"measured {len(measured) + 1}"
            tables[name] = measurement.table
            measured.append({"label": label, "title": measurement.title, "caption": measurement.caption, "table": name})
    parquet = {name: _parquet(table) for name, table in tables.items()}
    figures: list[dict[str, Any]] = []
    # Names of tables are numbered, because a figure may have several.
    for name, figure in _draw(dict(zip(labels, runs, strict=True)), unseen):
        chart, data = pack(figure.chart)
        files = {f"figure {len(figures) + 1}, table {n}": _parquet(table) for n, table in enumerate(data, start=1)}
        parquet |= files
        texts = {"reads": figure.reads, "misleads": figure.misleads}
        figures.append({"name": name, "chart": chart, "tables": [*files]} | texts)
    document = {"versions": installed_versions(), "subjects": subjects, "figures": figures, "unseen": unseen}
    if measured:
        document["measured"] = measured
    if advice is not None:
        document["advice"] = advice.to_json() | {"receipt": str(advice.receipt)}
    return Card(json_values(document), parquet)


def installed_versions() -> dict[str, str]:
    """Return the installed versions that a card stores, since its page depends on them."""
    return {"lorascope": __version__, "plotly": version("plotly")}


def _subject(label: str, inspection: Inspection) -> dict[str, Any]:
    """Return what a card says about one adapter or run, except for its tables and figures."""
    case = Case(inspection.run)
    (_, kind), *facts = inspection.facts
    meta = inspection.run.meta
    if meta.peak_memory is not None:
        holder = "process" if meta.device == "cpu" else str(meta.device)
        facts.append(("memory", f"{meta.peak_memory / 2**30:.2f} GiB at the peak of the {holder}"))
    # The doctor and the inspection share some findings.
    distinct = {(finding.cause, finding.message): finding for finding in (*find_faults(case), *inspection.details)}
    findings = sorted(distinct.values(), key=lambda finding: _SEVERITIES.index(finding.severity))
    return {
        "label": label,
        "kind": kind,
        "facts": dict(facts) | {"id": inspection.run.id},
        "findings": list(map(Finding.to_json, findings)),
        "unchecked": {SKIP_REASONS[missing]: names for missing, names in skipped_checks(case).items()},
        "notes": list(case.notes),
    }


def _draw(runs: dict[str, Result], unseen: dict[str, str]) -> Iterator[tuple[str, ReportFigure]]:
    """Yield the figures of the registry that show these runs, in the order in which a reader asks for them.

    The reasons for the absence of the others are added to ``unseen``.
    """
    # A figure of several runs needs its records in each; the reason of the first run that lacks them is shown.
    reasons: dict[Any, Any] = {}
    for run in runs.values():
        missing = available(run).set_index("figure")["missing"]
        reasons = missing[missing != ""].to_dict() | reasons
    subject: Any = runs
    if len(runs) == 1:
        (subject,) = runs.values()
    dots = []
    by_topic = sorted(FIGURES, key=lambda name: _TOPICS.index(FIGURES[name].topic))
    for name in dict.fromkeys((*_FIRST, *by_topic)):
        if FIGURES[name].runs > len(runs):
            continue
        if name in reasons:
            unseen[name] = reasons[name]
            continue
        try:
            panel = _without_label(draw(name, subject), runs)
        except ValueError as error:
            unseen[name] = printable(error)
            continue
        values = max(len(table) for chart in panel.chart.panels for _, table in chart.tables())
        if values > _MOST_VALUES:
            unseen[name] = f"too many values for a page ({values:,}): lorascope plot {name}"
        elif _has_one_value(panel.chart):
            dots.append((name, panel))
        else:
            yield name, panel
    yield from dots


def _has_one_value(chart: Drawable) -> bool:
    """Return whether each panel of a chart shows at most one value, which needs others next to it."""
    return all(len(table) <= 1 for panel in chart.panels for _, table in panel.tables())


def _without_label(figure: ReportFigure, runs: dict[str, Result]) -> ReportFigure:
    """Remove the title of a single chart that is the label of the only run: the page has the name of the figure."""
    chart, (run, *other_runs) = figure.chart, runs.values()
    if not other_runs and isinstance(chart, Chart) and chart.title == printable(run.label):
        return replace(figure, chart=replace(chart, title=""))
    return figure


def _join_tables(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return tables below each other, with the label in the first column if there are several."""
    if len(tables) == 1:
        return next(iter(tables.values()))
    return pd.concat([table.assign(adapter=label)[["adapter", *table.columns]] for label, table in tables.items()])


def _parquet(table: pd.DataFrame) -> bytes:
    file = BytesIO()
    table.reset_index(drop=True).to_parquet(file, compression="zstd")  # an index would be one more column
    return file.getvalue()
