"""Excerpt of a run: a run folder with some of its records and arrays, from which figures can be drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.safetensors_io import TensorFile, file_hash, write_bytes, write_json, write_tensors
from lorascope.runs.layout import snapshot_file
from lorascope.runs.manifest import SnapshotAbout, read_about
from lorascope.runs.run import Run

T = TypeVar("T")
_PLACE = ["step", "module", "index"]
_COMPARED = ("id", "method", "recipe", "settings", "task", "seed", "status", "modules", "states", "facts", "quantities")


def write_excerpt(run: Run, path: Path, quantities: Collection[str], arrays: Collection[str]) -> Run:
    """Write the records of some quantities, and some arrays of the snapshots, to a run folder.

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
    phases = [*run.parents, run]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=path.parent) as beside:
        draft, old = Path(beside) / "draft", Path(beside) / "old"
        for phase in phases:
            _write_phase(phase, draft / phase._folder.name if run.parents else draft, quantities, arrays)
        if path.exists():  # it stays until the new one is complete
            path.rename(old)
        draft.rename(path)
    return Run.read(path / run._folder.name if run.parents else path)


def _write_phase(run: Run, path: Path, quantities: Collection[str], arrays: Collection[str]) -> None:
    table = run.table[run.table["quantity"].isin(list(quantities))]
    texts = table.select_dtypes("category").columns
    table = table.assign(**{name: table[name].cat.remove_unused_categories() for name in texts})
    write_bytes(path / "records.parquet", table.to_parquet(index=False))
    written = ["records.parquet"]
    for step in run._all_steps():
        file = TensorFile(run._file(snapshot_file(step)))
        chosen = {name: file[name] for name in file if name.rpartition("/")[2] in arrays}
        if chosen:
            about = msgspec.to_builtins(_about_arrays(read_about(file), chosen))
            write_tensors(path / snapshot_file(step), chosen, about)
            written.append(snapshot_file(step))
    known = {name: entry for name, entry in (run.meta.quantities or {}).items() if name in quantities}
    meta = replace(run.meta, checksums={name: file_hash(path / name) for name in written}, quantities=known)
    write_json(path / "run.json", meta.to_json())


def _about_arrays(about: SnapshotAbout, names: Collection[str]) -> SnapshotAbout:
    """Return the description of some arrays of a snapshot."""
    factors = {
        module: factors
        for module, factors in about.factors.items()
        if all(f"{module}/{factor}" in names for factor in factors)
    }

    def select(values: Mapping[str, T]) -> dict[str, T]:
        return {module: value for module, value in values.items() if module in factors}

    axes = {name: found for name, found in about.axes.items() if name in names}
    return SnapshotAbout(factors, select(about.scales), select(about.exact), axes, select(about.forms))


def excerpt_differences(excerpt: Run, other: Run) -> list[str]:
    """Return what differs between two excerpts of a run: fields of "run.json", quantities, and arrays with their step.

    Numbers may differ by the rounding of another version.
    """
    two = (excerpt, other)
    fields = [name for name in _COMPARED if getattr(excerpt.meta, name) != getattr(other.meta, name)]
    quantities = sorted(set().union(*(run.table["quantity"] for run in two)))
    records = [name for name in quantities if not _are_close(*(_records(run, name) for run in two))]
    places = sorted({(name, step) for run in two for name in run.snapshot_names() for step in run.snapshot_steps(name)})
    arrays = [
        f"{name} at step {step}"
        for name, step in places
        if not all(step in run.snapshot_steps(name) for run in two)
        or not _are_close(*(run.snapshot(name, step) for run in two))
    ]
    return [*fields, *(f"records of {name}" for name in records), *arrays]


def _records(run: Run, quantity: str) -> pd.DataFrame:
    """Return the records of a quantity, sorted by step, module and index."""
    rows = run.table.loc[run.table["quantity"] == quantity, [*_PLACE, "value"]]
    return rows.sort_values(_PLACE).reset_index(drop=True)


def _are_close(one: pd.DataFrame, two: pd.DataFrame) -> bool:
    places, values = zip(*((table.drop(columns="value"), table["value"]) for table in (one, two)), strict=True)
    same_places = places[0].astype("object").map(str).equals(places[1].astype("object").map(str))
    return same_places and np.allclose(values[0], values[1], rtol=1e-9, atol=0, equal_nan=True)
