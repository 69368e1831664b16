"""Figures of the gallery, drawn from the runs of the evidence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.charts.chart import Drawable
from lorascope.charts.save import save_small
from lorascope.evidence import figures, store
from lorascope.evidence.blocks import PAPERS
from lorascope.evidence.figures import About
from lorascope.evidence.store import Evidence
from lorascope.methods.base import from_config
from lorascope.probes.base import EvidenceFigure, Probe
from lorascope.runs.manifest import Manifest, Parameters, Test
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.schema import records
from lorascope.schema.records import Record
from lorascope.updates import Update

_LEAST = 2  # seeds of a figure that shows all
_SCORES = {
    "eval_loss": "validation_loss",
    "eval_metric": "validation_metric",
    "test_loss": "test_loss",
    "test_metric": "test_metric",
}


class KeptRun(Result):
    """A run as the evidence keeps it: its row and its kept tables, without factors and records of its training.

    Parameters
    ----------
    row : mapping
        Its row in ``runs.csv``.
    tables : mapping name -> DataFrame
        Its kept tables.
    """

    kind = "kept run"
    has_history = False

    def __init__(self, row: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> None:
        method = json.loads(row["method"])
        name = "perplexity" if math.isnan(row["validation_chance"]) else "accuracy"
        super().__init__(
            None,
            Manifest(
                id=row["run"],
                label=from_config(method).label(),
                method=method,
                recipe=method,
                model=row["model"],
                task=row["task"],
                seed=int(row["seed"]),
                status="done",
                settings={**json.loads(row["settings"]), "lr": row["rate"]},
                parameters=Parameters(int(row["trained_parameters"])),
                modules=[],
                test=Test(name, row["test_metric"], row["test_loss"]),
            ),
        )
        self._scores = {quantity: float(row[column]) for quantity, column in _SCORES.items()}
        self.tables = tables

    @cached_property
    def table(self) -> pd.DataFrame:
        known = {quantity: value for quantity, value in self._scores.items() if not math.isnan(value)}
        rows = [(self.meta.settings["steps"], Record(quantity, value)) for quantity, value in known.items()]
        return records.frame(self.id, rows, self.modules)

    def factors(self, step: int | None = None, state: str = "last") -> dict[str, Any]:
        return {}

    def updates(self, step: int | None = None, state: str = "last") -> dict[str, Update]:
        return {}

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        return set()

    def ranks(self, state: str = "last") -> dict[str, int]:
        return {}


def draw_figures(folder: Path, out: Path, images: Path, probes: Iterable[Probe], commit: str) -> None:
    """Draw the figures whose runs are in the evidence, unless they are kept with the same runs.

    Parameters
    ----------
    folder : path
        Folder of evidence, to which the data of the charts is added.
    out : path
        Folder of the runs. A figure of a run that it lacks stays as it is kept.
    images : path
        Folder of the images.
    probes : iterable of Probe
        Probes with their figures.
    commit : str
        Commit of this repository, which the images contain.
    """
    evidence = store.read(folder)
    blocks = evidence.blocks()
    if not blocks:
        return
    judging, find = evidence.in_block(blocks[0]), _finder(out)
    for heading, figure in [(_heading(each), figure) for each in probes for figure in each.evidence_figures()]:
        rows, image = _rows_of(figure, judging), images / f"{figure.name}.png"
        known = evidence.figures.get(figure.name)
        # A figure without a commit is from before images had a digest of their pixels.
        same_image = known and known.about.commit and known.digest == figures.digest_in(image)
        if known and same_image and set(known.about.runs) == {row["run"] for row in rows}:
            continue
        runs = [_kept_run(row, evidence) if figure.scores_only else find(row) for row in rows]
        if not rows or None in runs:
            continue
        by_label: dict[str, list[Any]] = {
            label: [run for run, row in zip(runs, rows, strict=True) if row["arm"] == arm]
            for label, arm in figure.arms.items()
        }
        try:
            chart = figure.draw(by_label)
        except ValueError as error:  # runs of an earlier version may lack records
            print(f"cannot draw {figure.name}: {error}", flush=True)
            continue
        about = About(heading, figure.alt, tuple(row["run"] for row in rows), commit)
        ids = {run.id: row["run"] for run, row in zip(runs, rows, strict=True) if run}
        kept = figures.write(folder, figure.name, _plain_table(chart, ids), about)
        save_small(chart, image, runs=list(about.runs), commit=commit, data_sha256=kept.digest)
        print(f"{figure.name}: drawn from {len(rows)} runs", flush=True)


def _rows_of(figure: EvidenceFigure, evidence: Evidence) -> list[dict[str, Any]]:
    """Return the rows of the runs that a figure shows; none if some are missing or diverged."""
    arms = set(figure.arms.values())
    runs = evidence.runs[evidence.runs["arm"].isin(list(arms))]
    judged, diverged = runs[runs["role"] == "judged"], runs["trained_parameters"].isna()
    first = int(judged["seed"].min()) if len(judged) else 0
    seeds = evidence.seeds(sorted(arms), first)[: figure.seeds]
    if figure.table:
        having = evidence.kept.get(figure.table, {})
        seeds = [seed for seed in seeds if all(evidence.run(arm, seed) in having for arm in arms)]
    if len(seeds) < (figure.seeds or _LEAST) or diverged[judged.index].any():
        return []
    rows = judged[judged["seed"].isin(seeds)].sort_values("seed", kind="stable")
    if figure.tuning:
        tuned = runs[(runs["role"] == "tuning") & ~diverged]
        # The validation loss of judged runs chose no rate.
        rows = pd.concat([tuned, rows.assign(validation_loss=math.nan, validation_metric=math.nan)])
    listed: list[Any] = rows.to_dict("records")
    return listed


def _kept_run(row: Mapping[str, Any], evidence: Evidence) -> KeptRun:
    return KeptRun(row, {name: tables[row["run"]] for name, tables in evidence.kept.items() if row["run"] in tables})


def _finder(out: Path) -> Callable[[Mapping[str, Any]], Run | None]:
    """Return a function that finds the run of a row of ``runs.csv`` in a folder, or None if it is not there."""
    folders = {json.loads(file.read_bytes())["id"]: file.parent for file in out.rglob("run.json")}

    def find(row: Mapping[str, Any]) -> Run | None:
        # The id in the evidence ends with a hash of the machine, because another one gives the run other numbers.
        folder = folders.get(str(row["run"]).partition("-")[0])
        run = Run.read(folder) if folder else None
        if run is None or not run.finished:
            return None
        same = (math.isclose(run.score.loss, row["test_loss"]), math.isclose(run.score.metric, row["test_metric"]))
        return run if all(same) else None

    return find


def _heading(probe: Probe) -> str:
    """Return the method of a probe's paper, or what comes before the colon of its title."""
    found = [name for name, arxiv in PAPERS.items() if arxiv in probe.source]
    return found[0] if len(found) == 1 else probe.title.partition(":")[0]


def _plain_table(chart: Drawable, ids: Mapping[str, str]) -> pd.DataFrame:
    """Return the data of a chart with text and numbers only, and with the ids of the evidence."""
    table = chart.flat()
    texts = [name for name, kind in table.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    table = table.astype(dict.fromkeys(texts, "str"))
    return table.assign(run=table["run"].replace(ids)) if "run" in table else table
