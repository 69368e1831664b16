"""The report of ``lorascope reproduce``: the kept verdicts, then one short run per method among the kept seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.files.seals import require_own
from lorascope.files.typed_json import to_json_rows
from lorascope.pages import page
from lorascope.pages.page import Section
from lorascope.pages.report_figure import draw
from lorascope.papers.judging import kept_runs, kept_verdicts, registration
from lorascope.papers.judging.kept_verdicts import KeptVerdicts
from lorascope.papers.registry import PROBES
from lorascope.papers.training import kept_comparison, short_runs
from lorascope.runs.run import Run

REPORT = "report.html"
_TABLE = "Runs of this seed"
_COLUMNS = {"trained": "trained parameters", "rate": "learning rate"}
_POSITIONS = "Quantities of these runs among the kept seeds"


@dataclass(frozen=True)
class Reproduction:
    """Reproduction, the result of ``reproduce``.

    Parameters
    ----------
    path : Path
        The report.
    seed : int
        Seed of the runs.
    verdicts : KeptVerdicts
        Verdicts that are kept; the runs add none.
    runs : DataFrame
        ``method, accuracy, trained, seconds, steps, rate``: one row per run.
    places : DataFrame
        Quantities of the runs among the kept seeds; see ``kept_comparison.positions``.
    """

    path: Path
    seed: int
    verdicts: KeptVerdicts
    runs: pd.DataFrame
    places: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values; numbers that do not exist are None."""
        return {
            "report": str(self.path), "seed": self.seed, "notes": list(self.verdicts.notes),
            "verdicts": to_json_rows(self.verdicts.table), "runs": to_json_rows(self.runs),
            "places": to_json_rows(self.places),
        }  # fmt: skip


def reproduce(out: str | Path, seed: int, data: Path = registration.FILE.parent) -> Reproduction:
    """Reproduce the study: train one short run of every method, and report it among the kept seeds, below the verdicts.

    Parameters
    ----------
    out : path
        Output folder. Runs are stored in ``out/runs``, and finished runs in it are reused.
    seed : int
        Seed of the runs.
    data : path
        Folder ``data`` of a clone, with registration and evidence. Both may be missing.

    Raises
    ------
    FileExistsError
        ``out`` has a ``report.html`` that lorascope did not write.
    RunsFailed
        A run failed; the others are saved.
    """
    path = Path(out) / REPORT
    require_own(path)
    file, evidence = data / "registered.toml", kept_runs.read_kept(data / "evidence")
    kept, claims = evidence.of_main_machine(), None
    if file.exists():
        claims = registration.read(file)
    runs = short_runs.train_short_runs(Path(out) / "runs", seed, claims, evidence.runs)
    labels = [label for label in runs if short_runs.has_task_of_kept_runs(label)]
    quantities = []
    if claims:
        quantities = kept_comparison.quantities(claims, labels)
    tables = kept_comparison.keep_tables(runs, quantities)
    positions = kept_comparison.positions({label: runs[label] for label in labels}, tables, quantities, kept)
    over_kept = kept_comparison.figures(runs, tables, kept)
    verdicts = kept_verdicts.read(data)
    result = Reproduction(path, seed, verdicts, _runs_table(runs), positions)
    sections = [
        Section(
            "verdicts", "Kept verdicts", tables={"Verdicts": verdicts.table}, notes=verdicts.notes, filter="outcome"
        ),
        Section(
            "runs",
            f"One run per method, seed {seed}",
            f"Few steps on texts of up to {short_runs.LENGTH} tokens, {short_runs.TEST_ROWS} test rows. The kept runs "
            "have more steps and longer texts, so this seed does not test the claims.",
            tables={_TABLE: result.runs.rename(columns=_COLUMNS), _POSITIONS: positions},
            figures=[draw("training_curves", runs)],
        ),
    ]
    for probe in PROBES.values():
        figures = [*probe.figures(runs), *(over_kept[key] for key in over_kept if key in probe.keep)]
        if figures:
            texts = (probe.name, probe.title, probe.question, probe.source)
            sections.append(Section(*texts, figures=figures, notes=probe.notes, folded=True))
    title = "Low-rank adaptation: kept verdicts and a new run"
    lead = "Verdicts on the claims of the papers, from kept runs; then one new run of every method."
    page.write(path, title, lead, sections, run_facts(list(runs.values()), datetime.now(UTC)))
    return result


def run_facts(runs: Sequence[Run], now: datetime) -> dict[str, str]:
    """Collect the facts in the header of a reproduction: what the runs have in common, and when it was written."""
    facts = {"Written": [f"{now:%Y-%m-%d %H:%M} UTC"], "Device": [], "Versions": [], "Commit": []}
    for run in runs:
        facts["Device"].append(run.meta.device or "")
        facts["Versions"].append(", ".join(f"{name} {version}" for name, version in (run.meta.versions or {}).items()))
        facts["Commit"].append((run.meta.commit or "")[:12])
    joined = {}
    for term, texts in facts.items():
        if text := ", ".join(filter(None, dict.fromkeys(texts))):
            joined[term] = text
    return joined


def _runs_table(runs: dict[str, Run]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "method": label,
            "accuracy": run.score.metric,
            "trained": run.meta.parameters.trained,
            "seconds": round(run.meta.total_seconds),
            "steps": run.meta.settings["steps"],
            "rate": run.meta.settings["lr"],
        }
        for label, run in runs.items()
    )
