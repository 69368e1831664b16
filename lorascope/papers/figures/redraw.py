"""Drawing of the gallery from runs of the evidence, and again from the excerpts that the evidence keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.charts.chart import Drawable
from lorascope.charts.save import save_small
from lorascope.files.parquet_tables import read_table
from lorascope.files.printable import count_phrase, printable
from lorascope.papers.figures.excerpt import EXCERPTS, keep_excerpts, run_finder
from lorascope.papers.figures.gallery_figure import GalleryFigure, KeptScores, Sections, figures_by_name
from lorascope.papers.judging import kept_figures, kept_runs
from lorascope.papers.judging.csv_tables import compare_tables
from lorascope.papers.judging.kept_figures import FigureAbout, KeptFigure
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.runs.run import Run

_FEWEST_SEEDS = 2  # of a figure that shows all seeds: one has no interval


def draw_figures(folder: Path, out: Path, images: Path, sections: Sections, commit: str) -> None:
    """Draw or redraw the figures whose runs are in the evidence, unless they are kept with the same runs and data.

    Parameters
    ----------
    folder : path
        Folder of evidence, to which the data of the charts and excerpts of the runs are added.
    out : path
        Folder of the runs. A figure of a run that it lacks is drawn from kept excerpts, or stays as it is.
    images : path
        Folder of the images.
    sections : Sections
        Figures by heading.
    commit : str
        Commit of this repository, which the images contain.
    """
    evidence = kept_runs.read(folder)
    main, find = evidence.of_main_machine(), run_finder(out)
    by_name = figures_by_name(sections)
    keep_excerpts(folder, main, find, by_name)
    for heading, figure in by_name.values():
        rows = _rows_of(figure, main)
        runs: list[Any] = []
        try:
            for row in rows:
                if figure.shows_factors:
                    runs.append(find(row))
                else:
                    runs.append(_kept_run(figure, evidence, folder, row))
            if not rows or None in runs:  # the kept figure then stays as it is
                continue
            table, chart = _draw(figure, rows, runs)
        except Exception as error:  # runs of an earlier version may lack records, and any value may be damaged
            print(f"cannot draw {figure.name}: {error}", flush=True)
            continue
        about = _describe(heading, figure, rows, commit)
        image = images / f"{figure.name}.png"
        if _is_kept(folder, figure.name, evidence.figures.get(figure.name), about, table, image):
            continue
        digest = kept_figures.write(folder, figure.name, table, about).digest
        save_small(chart, image, runs=list(about.runs), commit=commit, data_sha256=digest)
        print(f"{figure.name}: drawn from {len(rows)} runs", flush=True)


def _describe(heading: str, figure: GalleryFigure, rows: Sequence[Mapping[str, Any]], commit: str) -> FigureAbout:
    return FigureAbout(heading, figure.alt, tuple(row["run"] for row in rows), commit)


def _is_kept(
    folder: Path, name: str, kept: KeptFigure | None, about: FigureAbout, table: pd.DataFrame, image: Path
) -> bool:
    """Return whether a figure is kept with these runs, text and data, and with its image."""
    if kept is None or kept.digest != kept_figures.digest_in(image):
        return False
    # Another commit may draw the same figure, which then stays as it is.
    same = kept.about == replace(about, commit=kept.about.commit)
    return same and not list(compare_tables("", _to_texts(_read(folder, name)), _to_texts(table)))


def differences(folder: Path, evidence: Evidence, sections: Sections) -> Iterator[str]:
    """Redraw the kept figures from kept scores, tables and excerpts; return one line for each difference.

    The data of figures of factors are left out, because factors are not kept.
    """
    by_name, main = figures_by_name(sections), evidence.of_main_machine()
    for name, kept in evidence.figures.items():
        file = f"{kept_figures.FOLDER}/{name}.parquet"
        if name not in by_name:
            yield f"{file}: no figure of the gallery has this name"
            continue
        heading, figure = by_name[name]
        try:
            yield from _figure_differences(file, folder, evidence, heading, figure, kept, _rows_of(figure, main))
        except Exception as error:  # any cell of runs.csv, excerpt or table may be damaged
            yield f"{file}: cannot be drawn again: {' '.join(str(error).split()) or repr(error)}"
    ids = set(evidence.runs["run"])
    for path in sorted((folder / EXCERPTS).glob("*")):
        if path.name not in ids:
            yield f"{EXCERPTS}/{path.name}: not a run of runs.csv"


def _figure_differences(
    file: str,
    folder: Path,
    evidence: Evidence,
    heading: str,
    figure: GalleryFigure,
    kept: KeptFigure,
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    """Compare a kept figure with the gallery and the runs that it should show."""
    expected = _describe(heading, figure, rows, kept.about.commit)
    for field in ("heading", "alt", "runs"):
        actual, right = getattr(kept.about, field), getattr(expected, field)
        if actual != right:
            yield f"{file}: {field}: kept {_shorten(actual)}, recomputed {_shorten(right)}"
    # Factors are not kept, and the data of other runs always differ.
    if figure.shows_factors or kept.about.runs != expected.runs:
        return
    runs = [_kept_run(figure, evidence, folder, row) for row in rows]
    if None in runs:
        missing = rows[runs.index(None)]["run"]
        yield f"{EXCERPTS}/{missing}: no finished run with the scores in runs.csv, but {file} shows it"
        return
    table, _ = _draw(figure, rows, runs)
    yield from compare_tables(file, _to_texts(_read(folder, figure.name)), _to_texts(table))


def _shorten(value: str | tuple[str, ...]) -> str:
    if isinstance(value, str):
        return repr(printable(value))
    first = printable(", ".join(value[:3]))
    if len(value) > 3:
        first += ", ..."
    return f"{count_phrase(len(value), 'run')} ({first})"


def _read(folder: Path, name: str) -> pd.DataFrame:
    file = folder / kept_figures.FOLDER / f"{name}.parquet"
    return read_table(file, file)


def _to_texts(table: pd.DataFrame) -> pd.DataFrame:
    return table.reset_index(drop=True).astype("object").map(str)


def _draw(
    figure: GalleryFigure, rows: Sequence[Mapping[str, Any]], runs: Sequence[Any]
) -> tuple[pd.DataFrame, Drawable]:
    """Return a chart and its data, in which runs have the ids of the evidence."""
    by_arm: dict[str, list[Any]] = {}
    ids = {}
    for run, row in zip(runs, rows, strict=True):
        by_arm.setdefault(row["arm"], []).append(run)
        ids[run.id] = row["run"]
    chart = figure.draw({label: by_arm.get(arm, []) for label, arm in figure.arms.items()})
    return _plain_table(chart, ids), chart


def _rows_of(figure: GalleryFigure, evidence: Evidence) -> list[dict[str, Any]]:
    """Return the rows of the runs that a figure shows, in its order; none if some are missing or diverged."""
    arms = set(figure.arms.values())
    runs = evidence.runs[evidence.runs["arm"].isin(list(arms))]
    judged, diverged = runs[runs["role"] == "judged"], runs["trained_parameters"].isna()
    if judged.empty:
        return []
    seeds, fewest = evidence.seeds(sorted(arms), int(judged["seed"].min())), _FEWEST_SEEDS
    if not figure.shows_scores:
        seeds, fewest = seeds[: figure.seeds], figure.seeds
    if figure.table:
        by_run = evidence.kept.get(figure.table, {})
        for arm in arms:
            seeds = [seed for seed in seeds if evidence.run(arm, seed) in by_run]
    if len(seeds) < fewest or diverged[judged.index].any():
        return []
    rows = judged[judged["seed"].isin(seeds)].sort_values("seed", kind="stable")
    if figure.tuning:
        tuned = runs[(runs["role"] == "tuning") & ~diverged]
        # The validation loss of judged runs chose no rate.
        rows = pd.concat([tuned, rows.assign(validation_loss=math.nan, validation_metric=math.nan)])
    records: list[Any] = rows.to_dict("records")
    return records


def _kept_run(
    figure: GalleryFigure, evidence: Evidence, folder: Path, row: Mapping[str, Any]
) -> Run | KeptScores | None:
    """Return what the evidence keeps of a run for a figure; None if nothing is."""
    if figure.shows_scores:
        tables = {name: tables[row["run"]] for name, tables in evidence.kept.items() if row["run"] in tables}
        return KeptScores(row, tables)
    path = folder / EXCERPTS / row["run"]
    run = run_finder(path)(row)
    if run is None:
        return None
    if run.meta.parents and run.path == path:
        raise ValueError(f"{EXCERPTS}/{row['run']}: its earlier phases are not in this folder")
    # AutoLoRA's retraining is a LoRA, and a phase of NeFT refers to the one before it.
    methods, references = [], [{"run": phase.id} for phase in run.parents]
    for phase in (*run.parents, run):
        method = dict(phase.meta.method)
        for name, value in method.items():
            if value in references:
                method[name] = None
        methods.append(method)
    if run.meta.seed != row["seed"]:
        raise ValueError(f"{EXCERPTS}/{row['run']}: seed differs from runs.csv")
    if json.loads(row["method"]) not in methods:
        raise ValueError(f"{EXCERPTS}/{row['run']}: method differs from runs.csv")
    return run


def _plain_table(chart: Drawable, ids: Mapping[str, str]) -> pd.DataFrame:
    """Return the data of a chart with text and numbers only, and with the ids of the evidence."""
    table = chart.flat()
    texts = [name for name, kind in table.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    table = table.astype(dict.fromkeys(texts, "str"))
    if "run" in table:
        table = table.assign(run=table["run"].replace(ids))
    return table
