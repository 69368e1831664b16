"""Excerpts of runs: run folders with some records and arrays of a run, from which figures can be drawn again."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile, write_tensors
from lorascope.files.typed_json import read_json, to_typed
from lorascope.files.whole_files import file_hash, write_bytes, write_json
from lorascope.papers.figures.gallery_figure import GalleryFigure, Sections, figures_by_name
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.runs.layout import snapshot_file
from lorascope.runs.manifest import SnapshotAbout, read_about
from lorascope.runs.run import Run

T = TypeVar("T")
EXCERPTS = "shown"
"""Folder in a folder of evidence: the excerpts of runs that the figures show."""
Find = Callable[[Mapping[str, Any]], Run | None]
"""Function that finds the run of a row of ``runs.csv``, or None if it is not there."""
_KEY = ["step", "module", "index"]
# Commit, versions, times and checksums may differ between two trainings of a run.
_COMPARED = ("id", "method", "recipe", "settings", "task", "seed", "status", "modules", "states", "facts", "quantities")


def write_excerpt(run: Run, path: Path, quantities: Collection[str], arrays: Collection[str]) -> Run:
    """Write the excerpt of a run, the records of some quantities and some arrays of the snapshots, to a run folder.

    Parameters
    ----------
    run : Run
        A finished run; earlier phases are written next to it, each in a separate folder.
    path : path
        Folder of the excerpt, which is replaced.
    quantities : collection of str
        Quantities of the records.
    arrays : collection of str
        Names of arrays without their module, such as "selected". Factors form an update only if all are named.

    Returns
    -------
    Run
        The excerpt. It has no saved parameters and no predictions.
    """
    phases, names = [*run.parents, run], [""]  # a run of one phase is the folder itself
    if run.parents:
        names = [phase._folder.name for phase in phases]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=path.parent) as temporary:
        draft, old = Path(temporary) / "draft", Path(temporary) / "old"
        for phase, name in zip(phases, names, strict=True):
            _write_phase(phase, draft / name, quantities, arrays)
        if path.exists():  # it stays until the new one is complete
            path.rename(old)
        draft.rename(path)
    return Run.read(path / names[-1])


def _write_phase(run: Run, path: Path, quantities: Collection[str], arrays: Collection[str]) -> None:
    table = run.table[run.table["quantity"].isin(list(quantities))]
    texts = table.select_dtypes("category").columns
    # Parquet stores all categories, also those of the records that are left out.
    table = table.assign(**{name: table[name].cat.remove_unused_categories() for name in texts})
    write_bytes(path / "records.parquet", table.to_parquet(index=False))
    written = ["records.parquet"]
    for step in run._all_steps():
        file = TensorFile(run._file(snapshot_file(step)))
        tensors = {name: file[name] for name in file if name.rpartition("/")[2] in arrays}
        if tensors:
            about = msgspec.to_builtins(_about_arrays(read_about(file), tensors))
            write_tensors(path / snapshot_file(step), tensors, about)
            written.append(snapshot_file(step))
    meta = replace(
        run.meta,
        checksums={name: file_hash(path / name) for name in written},
        quantities=_select(run.meta.quantities or {}, quantities),
    )
    write_json(path / "run.json", meta.to_json())


def _about_arrays(about: SnapshotAbout, names: Collection[str]) -> SnapshotAbout:
    """Return the description of some arrays of a snapshot."""
    modules = []
    for module, factors in about.factors.items():
        # With a part of its factors, an update could not be read.
        if set(names) >= {f"{module}/{factor}" for factor in factors}:
            modules.append(module)
    return SnapshotAbout(
        _select(about.factors, modules),
        _select(about.scales, modules),
        _select(about.exact, modules),
        _select(about.axes, names),
        _select(about.forms, modules),
    )


def _select(values: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    return {name: value for name, value in values.items() if name in names}


def excerpt_differences(
    excerpt: Run, other: Run, only_kept_steps: bool = False, tolerance: float | None = None
) -> list[str]:
    """Return what differs between two excerpts of a run: fields of "run.json", quantities, and arrays with their step.

    Numbers may differ by the rounding of another version, or by ``tolerance`` times the largest one of their quantity
    or array. With ``only_kept_steps``, records of the other excerpt are compared at the steps at which the first one
    has their quantity.
    """
    differences = [name for name in _COMPARED if getattr(excerpt.meta, name) != getattr(other.meta, name)]
    for name in sorted({*excerpt.table["quantity"], *other.table["quantity"]}):
        records, other_records = _records(excerpt, name), _records(other, name)
        if only_kept_steps:
            other_records = other_records[other_records["step"].isin(records["step"])].reset_index(drop=True)
        if not _are_close(records, other_records, tolerance):
            differences.append(f"records of {name}")
    for name in sorted({*excerpt.snapshot_names(), *other.snapshot_names()}):
        steps, other_steps = excerpt.snapshot_steps(name), other.snapshot_steps(name)
        for step in sorted({*steps, *other_steps}):
            missing = step not in steps or step not in other_steps
            if missing or not _are_close(excerpt.snapshot(name, step), other.snapshot(name, step), tolerance):
                differences.append(f"{name} at step {step}")
    return differences


def _records(run: Run, quantity: str) -> pd.DataFrame:
    """Return the records of a quantity, sorted by step, module and index."""
    rows = run.table.loc[run.table["quantity"] == quantity, [*_KEY, "value"]]
    return rows.sort_values(_KEY).reset_index(drop=True)


def _are_close(table: pd.DataFrame, other: pd.DataFrame, tolerance: float | None) -> bool:
    relative, absolute = 1e-9, 0.0
    if tolerance is not None:
        relative, absolute = 0.0, tolerance * table["value"].abs().max()
    if not _key_texts(table).equals(_key_texts(other)):
        return False
    return np.allclose(table["value"], other["value"], rtol=relative, atol=absolute, equal_nan=True)


def _key_texts(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="value").astype("object").map(str)


def keep_excerpts(folder: Path, main: Evidence, find: Find, by_name: Mapping[str, tuple[str, GalleryFigure]]) -> None:
    """Add the excerpts of all runs that figures show, also of incomplete figures: the folder of a run may be lost."""
    rows: list[Any] = main.runs.to_dict("records")
    for row in rows:
        contents = _contents_of(row, main, by_name)
        if any(contents) and (run := find(row)) is not None:
            write_excerpt(run, folder / EXCERPTS / row["run"], *contents)


def _contents_of(
    row: Mapping[str, Any], main: Evidence, by_name: Mapping[str, tuple[str, GalleryFigure]]
) -> tuple[set[str], set[str]]:
    """Return the quantities and arrays that figures show of a run."""
    quantities: set[str] = set()
    arrays: set[str] = set()
    if row["role"] == "judged":
        number = row["seed"] - main.judged["seed"].min()  # figures show the first judged seeds
        for _, figure in by_name.values():
            if row["arm"] in figure.arms.values() and number < figure.seeds:
                quantities.update(figure.quantities)
                arrays.update(figure.arrays)
    return quantities, arrays


def changed_excerpts(
    folder: Path,
    evidence: Evidence,
    row: Mapping[str, Any],
    new_row: Mapping[str, Any],
    retrained: Path,
    sections: Sections,
    tolerance: float | None = None,
) -> list[str]:
    """Return what differs between an excerpt for redrawing figures and the same run trained again, in one line each.

    Parameters
    ----------
    folder : path
        Folder of evidence.
    evidence : Evidence
        Its content.
    row, new_row : mapping
        Row of ``runs.csv``, and that of the run that was trained again.
    retrained : path
        Folder of the run that was trained again.
    sections : Sections
        Figures by heading.
    tolerance : float or None
        See ``excerpt_differences``.
    """
    path = folder / EXCERPTS / row["run"]
    if not path.exists():
        return []
    excerpt, run = run_finder(path)(row), run_finder(retrained)(new_row)
    if excerpt is None or run is None:
        return [f"{EXCERPTS}/{row['run']}: no finished run with the scores of the one that was trained again"]
    quantities, arrays = _contents_of(row, evidence.of_main_machine(), figures_by_name(sections))
    # Later versions record more: quantities and steps that the excerpt lacks are not differences.
    quantities &= (excerpt.meta.quantities or {}).keys()
    with tempfile.TemporaryDirectory() as new:
        other = write_excerpt(run, Path(new) / "run", quantities, arrays)
        changed = excerpt_differences(excerpt, other, only_kept_steps=True, tolerance=tolerance)
    return [f"{EXCERPTS}/{row['run']}: {name}: other values when trained again" for name in changed]


def _folders(out: Path) -> dict[str, list[Path]]:
    """Return the run folders below a folder by the id of their runs; runs may share an earlier phase."""
    folders: dict[str, list[Path]] = {}
    for file in sorted(out.rglob("run.json")):
        id = to_typed(read_json(file, dict[str, Any]).get("id"), str, f"id of {file}")
        folders.setdefault(id, []).append(file.parent)
    return folders


def run_finder(out: Path) -> Find:
    """Return a function that finds runs in a folder."""
    folders = _folders(out)

    def find(row: Mapping[str, Any]) -> Run | None:
        # The id in the evidence ends with a hash of the machine, because another one gives the run other numbers.
        id = str(row["run"]).partition("-")[0]
        paths = folders.get(id, [])
        if len(paths) > 1:
            raise ValueError(f"two folders of run {printable(id)}: {printable(paths[0])} and {printable(paths[1])}")
        if not paths:
            return None
        run = Run.read(paths[0])
        # The folder may have the run with the scores of another machine.
        has_scores = (
            run.finished
            and math.isclose(run.score.loss, row["test_loss"])
            and math.isclose(run.score.metric, row["test_metric"])
        )
        return run if has_scores else None

    return find
