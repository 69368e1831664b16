"""Drawing of the gallery from runs of the evidence, and again from the excerpts that the evidence keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.charts.chart import Drawable
from lorascope.charts.save import save_small
from lorascope.evidence import figures, store
from lorascope.evidence.figures import About, KeptFigure
from lorascope.evidence.store import Evidence
from lorascope.evidence.verification import compare_tables
from lorascope.files.parquet_tables import read_table
from lorascope.files.typed_json import read_json
from lorascope.gallery.base import GalleryFigure
from lorascope.gallery.kept_scores import KeptScores
from lorascope.runs.excerpt import excerpt_differences, write_excerpt
from lorascope.runs.run import Run

SHOWN = "shown"
"""Folder in a folder of evidence: the excerpts of runs that the figures show."""
_PARTS = ("quantities", "arrays")
_LEAST = 2  # seeds of a figure that shows all


def draw_figures(
    folder: Path, out: Path, images: Path, sections: Mapping[str, Sequence[GalleryFigure]], commit: str
) -> None:
    """Draw the figures whose runs are in the evidence, unless they are kept with the same runs.

    Parameters
    ----------
    folder : path
        Folder of evidence, to which the data of the charts and excerpts of the runs are added.
    out : path
        Folder of the runs. A figure of a run that it lacks is drawn from kept excerpts, or stays as it is.
    images : path
        Folder of the images.
    sections : mapping heading -> sequence of GalleryFigure
        Figures by heading.
    commit : str
        Commit of this repository, which the images contain.
    """
    evidence = store.read(folder)
    blocks = evidence.blocks()
    if not blocks:
        return
    judging, find = evidence.in_block(blocks[0]), _finder(out)
    listed = [(heading, figure) for heading, section in sections.items() for figure in section]
    _keep_excerpts(folder, judging, find, [figure for _, figure in listed])
    for heading, figure in listed:
        rows = _rows_of(figure, judging)
        runs: list[Any] = [
            find(row) if figure.shows_factors else _kept_run(figure, evidence, folder, row) for row in rows
        ]
        if not rows or None in runs:
            continue
        try:
            table, chart = _draw(figure, rows, runs)
        except ValueError as error:  # runs of an earlier version may lack records
            print(f"cannot draw {figure.name}: {error}", flush=True)
            continue
        about = About(heading, figure.alt, tuple(row["run"] for row in rows), commit)
        image = images / f"{figure.name}.png"
        if _is_kept(folder, figure.name, evidence.figures.get(figure.name), about, table, image):
            continue
        kept = figures.write(folder, figure.name, table, about)
        save_small(chart, image, runs=list(about.runs), commit=commit, data_sha256=kept.digest)
        print(f"{figure.name}: drawn from {len(rows)} runs", flush=True)


def _keep_excerpts(
    folder: Path, judging: Evidence, find: Callable[[Mapping[str, Any]], Run | None], listed: Sequence[GalleryFigure]
) -> None:
    """Add the excerpts of all runs that figures show, also of incomplete figures: the folder of a run may be lost."""
    judged: list[Any] = judging.runs[judging.runs["role"] == "judged"].to_dict("records")
    first = min((row["seed"] for row in judged), default=0)
    for row in judged:
        showing = [
            figure
            for figure in listed
            if (figure.quantities or figure.arrays)
            and row["arm"] in figure.arms.values()
            and row["seed"] - first < (figure.seeds or math.inf)
        ]
        run = find(row) if showing else None
        if run is not None:
            quantities, arrays = ({name for each in showing for name in getattr(each, kind)} for kind in _PARTS)
            write_excerpt(run, folder / SHOWN / row["run"], quantities, arrays)


def _is_kept(folder: Path, name: str, known: KeptFigure | None, about: About, table: pd.DataFrame, image: Path) -> bool:
    """Return whether a figure is kept with these runs and data, and with its image."""
    # A figure without a commit is from before images had a digest of their pixels.
    if known is None or not known.about.commit or known.digest != figures.digest_in(image):
        return False
    same_runs = set(known.about.runs) == set(about.runs)
    return same_runs and not list(compare_tables("", *_texts(_read(folder, name), table)))


def differences(folder: Path, evidence: Evidence, sections: Mapping[str, Sequence[GalleryFigure]]) -> Iterator[str]:
    """Draw the kept figures again from kept scores, tables and excerpts; return one line for each different value.

    Figures of factors are left out, because factors are not kept.
    """
    known = {figure.name: figure for listed in sections.values() for figure in listed}
    for name, kept in evidence.figures.items():
        file = f"{figures.FOLDER}/{name}.parquet"
        figure = known.get(name)
        if figure is None:
            yield f"{file}: no figure of the gallery has this name"
            continue
        chosen = evidence.runs[evidence.runs["run"].isin(kept.about.runs)]
        if figure.shows_factors or len(chosen) < len(kept.about.runs):  # a missing run is reported by its name
            continue
        rows = _in_order(figure, chosen)
        try:
            runs = [_kept_run(figure, evidence, folder, row) for row in rows]
            if None in runs:
                yield f"{SHOWN}/{rows[runs.index(None)]['run']}: no such run, but {file} shows it"
                continue
            found, _ = _draw(figure, rows, runs)
            table = _read(folder, name)
        except (LookupError, ValueError) as error:
            yield f"{file}: cannot be drawn again: {error}"
            continue
        yield from compare_tables(file, *_texts(table, found))


def changed_excerpts(folder: Path, run: str, out: Path) -> list[str]:
    """Return what differs between the excerpts of a run and the same run in another folder, in one line each."""
    excerpts, runs = (_folders(path) for path in (folder / SHOWN / run, out))
    return [
        f"{SHOWN}/{run}: {difference}: kept, but other values when trained again"
        for id, path in excerpts.items()
        for difference in excerpt_differences(Run.read(path), Run.read(runs[id]))
    ]


def _read(folder: Path, name: str) -> pd.DataFrame:
    file = folder / figures.FOLDER / f"{name}.parquet"
    return read_table(file, file)


def _texts(*tables: pd.DataFrame) -> Iterator[pd.DataFrame]:
    return (table.astype("object").map(str) for table in tables)


def _draw(
    figure: GalleryFigure, rows: Sequence[Mapping[str, Any]], runs: Sequence[Any]
) -> tuple[pd.DataFrame, Drawable]:
    """Return a chart and its data, in which runs have the ids of the evidence."""
    by_label: dict[str, list[Any]] = {
        label: [run for run, row in zip(runs, rows, strict=True) if row["arm"] == arm]
        for label, arm in figure.arms.items()
    }
    chart = figure.draw(by_label)
    ids = {run.id: row["run"] for run, row in zip(runs, rows, strict=True)}
    return _plain_table(chart, ids), chart


def _rows_of(figure: GalleryFigure, evidence: Evidence) -> list[dict[str, Any]]:
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
    tuned = runs[(runs["role"] == "tuning") & ~diverged & figure.tuning]
    return _in_order(figure, pd.concat([tuned, judged[judged["seed"].isin(seeds)]]))


def _in_order(figure: GalleryFigure, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows of ``runs.csv`` in the order in which a figure shows them."""
    tuned, judged = runs[runs["role"] == "tuning"], runs[runs["role"] == "judged"].sort_values("seed", kind="stable")
    if figure.tuning:  # the validation loss of judged runs chose no rate
        judged = judged.assign(validation_loss=math.nan, validation_metric=math.nan)
    listed: list[Any] = pd.concat([tuned, judged]).to_dict("records")
    return listed


def _kept_run(
    figure: GalleryFigure, evidence: Evidence, folder: Path, row: Mapping[str, Any]
) -> Run | KeptScores | None:
    """Return what the evidence keeps of a run for a figure; None if nothing is."""
    if figure.scores_only:
        tables = {name: tables[row["run"]] for name, tables in evidence.kept.items() if row["run"] in tables}
        return KeptScores(row, tables)
    return _finder(folder / SHOWN / row["run"])(row)


def _folders(out: Path) -> dict[Any, Path]:
    """Return the run folders below a folder by the id of their runs."""
    return {read_json(file, dict[str, Any]).get("id"): file.parent for file in out.rglob("run.json")}


def _finder(out: Path) -> Callable[[Mapping[str, Any]], Run | None]:
    """Return a function that finds the run of a row of ``runs.csv`` in a folder, or None if it is not there."""
    folders = _folders(out)

    def find(row: Mapping[str, Any]) -> Run | None:
        # The id in the evidence ends with a hash of the machine, because another one gives the run other numbers.
        folder = folders.get(str(row["run"]).partition("-")[0])
        run = Run.read(folder) if folder else None
        if run is None or not run.finished:
            return None
        same = (math.isclose(run.score.loss, row["test_loss"]), math.isclose(run.score.metric, row["test_metric"]))
        return run if all(same) else None

    return find


def _plain_table(chart: Drawable, ids: Mapping[str, str]) -> pd.DataFrame:
    """Return the data of a chart with text and numbers only, and with the ids of the evidence."""
    table = chart.flat()
    texts = [name for name, kind in table.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    table = table.astype(dict.fromkeys(texts, "str"))
    return table.assign(run=table["run"].replace(ids)) if "run" in table else table
