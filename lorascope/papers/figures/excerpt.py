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
from lorascope.files.safetensors_io import TensorFile, write_tensors
from lorascope.files.whole_files import file_hash, write_bytes, write_json
from lorascope.runs.layout import snapshot_file
from lorascope.runs.manifest import SnapshotAbout, read_about
from lorascope.runs.run import Run

T = TypeVar("T")
_KEY = ["step", "module", "index"]
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
    phases = [*run.parents, run]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=path.parent) as temporary:
        draft, old = Path(temporary) / "draft", Path(temporary) / "old"
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


def excerpt_differences(excerpt: Run, other: Run) -> list[str]:
    """Return what differs between two excerpts of a run: fields of "run.json", quantities, and arrays with their step.

    Numbers may differ by the rounding of another version.
    """
    differences = [name for name in _COMPARED if getattr(excerpt.meta, name) != getattr(other.meta, name)]
    for name in sorted({*excerpt.table["quantity"], *other.table["quantity"]}):
        if not _are_close(_records(excerpt, name), _records(other, name)):
            differences.append(f"records of {name}")
    for name in sorted({*excerpt.snapshot_names(), *other.snapshot_names()}):
        steps, other_steps = excerpt.snapshot_steps(name), other.snapshot_steps(name)
        for step in sorted({*steps, *other_steps}):
            missing = step not in steps or step not in other_steps
            if missing or not _are_close(excerpt.snapshot(name, step), other.snapshot(name, step)):
                differences.append(f"{name} at step {step}")
    return differences


def _records(run: Run, quantity: str) -> pd.DataFrame:
    """Return the records of a quantity, sorted by step, module and index."""
    rows = run.table.loc[run.table["quantity"] == quantity, [*_KEY, "value"]]
    return rows.sort_values(_KEY).reset_index(drop=True)


def _are_close(table: pd.DataFrame, other: pd.DataFrame) -> bool:
    keys, other_keys = (rows.drop(columns="value").astype("object").map(str) for rows in (table, other))
    return keys.equals(other_keys) and np.allclose(table["value"], other["value"], rtol=1e-9, atol=0, equal_nan=True)
