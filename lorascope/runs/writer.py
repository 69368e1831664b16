"""Atomic writer of run folders.

Every file is written under a temporary name and renamed. The status in ``run.json`` is ``running`` from the start, and
``done`` only after all other files are stored and have checksums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile, write_tensors
from lorascope.files.typed_json import read_json
from lorascope.files.whole_files import file_hash, is_partial, write_bytes, write_json
from lorascope.runs.folders import own_files
from lorascope.runs.layout import GROWING, PREDICTIONS, REMOVED, TEXTS, snapshot_file
from lorascope.runs.manifest import Manifest
from lorascope.runs.run import Run
from lorascope.schema import records
from lorascope.schema.records import QUANTITIES, Factors, Item, Message, Record, Snapshot


class RunWriter:
    """Writer of one run folder; it sets ``status``, ``checksums`` and ``quantities`` of the manifest."""

    def __init__(self, path: Path, meta: Manifest) -> None:
        self.path, self.meta = path, meta
        self._modules = meta.table()
        self._table = records.concat([])
        self._rows: list[tuple[int, Record]] = []
        self._arrays: dict[int, list[Snapshot | Factors]] = {}
        self._folder: os.stat_result | None = None
        self._was_removed = False

    def begin(self, table: pd.DataFrame | None) -> None:
        """Write ``run.json``, and remove the files of an earlier attempt except snapshots at the steps of ``table``.

        Parameters
        ----------
        table : DataFrame or None
            Rows up to the checkpoint that training resumes from; None for a new run.
        """
        self._create_folder()
        if table is not None:
            self._table = table
        snapshots = {self.path / snapshot_file(step) for step in self._table["step"].unique().tolist()}
        partial_files = {file for file in self.path.rglob(".*") if is_partial(file) and file.is_file()}
        for file in (self._content_files() - snapshots) | partial_files:  # the latter are left by killed writers
            file.unlink()

    def _create_folder(self) -> None:
        write_json(self.path / "run.json", self.meta.to_json())
        self._folder = self.path.stat()

    def require_folder(self) -> None:
        """Raise an OSError if another folder has taken the place of the run's since `begin`; recreate a missing one."""
        if self._folder is None or not self.path.exists():
            self._was_removed |= self._folder is not None
            self._create_folder()
        elif not os.path.samestat(self.path.stat(), self._folder) and not self.has_manifest():
            raise OSError(f"cannot write {printable(self.path)}: another folder has taken its place")

    def has_manifest(self) -> bool:
        """Return whether the folder has the manifest of this run."""
        file = self.path / "run.json"
        stored: dict[str, Any] = {}
        with suppress(FileNotFoundError, ValueError):  # of another program
            stored = read_json(file, dict[str, Any])
        return (stored.get("id"), stored.get("started")) == (self.meta.id, self.meta.started)

    def collect(self, step: int, items: Iterable[Item]) -> None:
        """Add the records after ``step`` finished steps; ``write_arrays`` or ``flush`` writes them."""
        for item in items:
            if isinstance(item, Record):
                self._rows.append((step, item))
            elif not isinstance(item, Message):
                self._arrays.setdefault(step, []).append(item)

    def write_arrays(self) -> None:
        """Write pending arrays to disk; an array that cannot be written stays pending for the next call."""
        if self._arrays:
            self.require_folder()
        for step in list(self._arrays):  # a copy, because written steps are deleted
            self._write_step(self.path / snapshot_file(step), self._arrays[step])
            del self._arrays[step]

    def _write_step(self, path: Path, items: Iterable[Snapshot | Factors]) -> None:
        """Write arrays of a step in addition to those already stored for it."""
        arrays: dict[str, np.ndarray] = {}
        about: dict[str, dict[str, Any]] = {"axes": {}, "factors": {}, "scales": {}, "exact": {}}
        if path.exists():
            stored = TensorFile(path)
            arrays = {name: np.array(stored[name]) for name in stored}  # copies: the file is replaced
            about = stored.about
        for item in items:
            if isinstance(item, Snapshot):
                labels = {axis: list(values) for axis, values in item.labels.items()}
                arrays[item.name] = np.asarray(item.array)
                about["axes"][item.name] = {"axes": list(item.axes), "labels": labels}
                continue
            arrays |= {f"{item.module}/{name}": np.asarray(array) for name, array in item.arrays.items()}
            about["factors"][item.module] = list(item.arrays)
            if item.scale is not None:
                about["scales"][item.module] = item.scale
                about["exact"][item.module] = item.exact
                if item.form is not None:
                    about.setdefault("forms", {})[item.module] = item.form
        write_tensors(path, arrays, about)

    def write_rows(self, name: str, rows: pd.DataFrame) -> None:
        """Write what the final state predicts or generates for test rows; see ``Run.predictions`` and ``Run.texts``."""
        self.require_folder()
        write_bytes(self.path / name, rows.to_parquet(index=False))

    def table(self) -> pd.DataFrame:
        """Return all rows so far."""
        if self._rows:
            self._table = records.concat([self._table, records.frame(self.meta.id, self._rows, self._modules)])
            self._rows = []
        return self._table

    def flush(self) -> None:
        """Write the rows so far, so that a running run can be read; its files have no checksums yet."""
        self._write("running", lambda file: GROWING)

    def finish(self, status: str) -> Run:
        """Write the table, then ``run.json`` with the checksums of all files.

        The status is "broken" if the folder was removed meanwhile, because the arrays of earlier steps are lost.
        """
        self.require_folder()
        if self._was_removed and status == "done":
            status, self.meta.error = "broken", "its folder was removed during training"
        self._write(status, file_hash)
        run = Run(self.path, self.meta)
        vars(run)["table"] = self.table()  # its rows are valid, so they need not be read
        return run

    def _content_files(self) -> set[Path]:
        return own_files(self.path, "records.parquet", PREDICTIONS, TEXTS, "snapshots/*", "state/*")

    def _write(self, status: Any, checksum: Callable[[Path], str]) -> None:
        self.require_folder()
        self.write_arrays()
        write_bytes(self.path / "records.parquet", self.table().to_parquet(index=False))
        used = self.table()["quantity"].cat.categories
        self.meta.status = status
        files = sorted(self._content_files())
        self.meta.checksums = {file.relative_to(self.path).as_posix(): checksum(file) for file in files}
        self.meta.quantities = {name: QUANTITIES[name] for name in used}
        # Last, because it lists the checksums of all other files.
        write_json(self.path / "run.json", self.meta.to_json())


def remove_states(run: Run) -> None:
    """Delete the parameters that the writers of a run and of its earlier phases saved, but no tables or snapshots."""
    # The run comes first: train requires the state of a parent only if the run still has its own.
    for phase in [run, *run.parents]:
        folder, checksums = phase._folder, phase.meta.checksums
        states = [name for name in checksums if name.startswith("state/")]
        if phase.restorable:
            # The manifest comes first, so that it never lists a file that is gone.
            checksums |= dict.fromkeys(states, REMOVED)
            write_json(folder / "run.json", phase.meta.to_json())
        for name in states:
            (folder / name).unlink(missing_ok=True)
