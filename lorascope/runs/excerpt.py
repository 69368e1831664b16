"""Excerpt of a run: a run folder with some of its records and arrays, from which figures can be drawn."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec

from lorascope.files.safetensors_io import TensorFile, file_hash, write_bytes, write_json, write_tensors
from lorascope.runs.layout import snapshot_file
from lorascope.runs.manifest import About, read_about
from lorascope.runs.run import Run

T = TypeVar("T")


def write_excerpt(run: Run, path: Path, quantities: Collection[str], arrays: Collection[str]) -> Run:
    """Write the records of some quantities, and some arrays of the snapshots, to a run folder.

    Parameters
    ----------
    run : Run
        A finished run; earlier phases are written next to it, each in a separate folder.
    path : path
        Folder of the excerpt.
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
    for phase in phases:
        excerpt = _write_phase(phase, path / phase._folder.name if len(phases) > 1 else path, quantities, arrays)
    return excerpt


def _write_phase(run: Run, path: Path, quantities: Collection[str], arrays: Collection[str]) -> Run:
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
    return Run.read(path)


def _about_arrays(about: About, names: Collection[str]) -> About:
    """Return the description of some arrays of a snapshot."""
    factors = {
        module: factors
        for module, factors in about.factors.items()
        if all(f"{module}/{factor}" in names for factor in factors)
    }

    def of_factors(values: Mapping[str, T]) -> dict[str, T]:
        return {module: value for module, value in values.items() if module in factors}

    axes = {name: found for name, found in about.axes.items() if name in names}
    return About(factors, of_factors(about.scales), of_factors(about.exact), axes, of_factors(about.forms))


def excerpt_differences(excerpt: Run, run: Run) -> list[str]:
    """Return what differs between an excerpt and a run: "records of QUANTITY", or an array with its step."""
    same = {name: _values(excerpt, name) == _values(run, name) for name in sorted(set(excerpt.table["quantity"]))}
    found = [f"records of {name}" for name, equal in same.items() if not equal]
    for name in excerpt.snapshot_names():
        for step in excerpt.snapshot_steps(name):
            in_both = step in run.snapshot_steps(name)
            if not (in_both and excerpt.snapshot(name, step).equals(run.snapshot(name, step))):
                found.append(f"{name} at step {step}")
    return found


def _values(run: Run, quantity: str) -> bytes:
    """Return the values of a quantity in the order of the table, with their places."""
    rows = run.table[run.table["quantity"] == quantity]
    return rows[["step", "module", "index", "value"]].to_csv(index=False).encode()
