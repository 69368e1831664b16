"""Checkpoints of a run: one file each. An unfinished run resumes from the newest intact one; a fork from a kept one."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.array_types import UInt8
from lorascope.files.parquet_tables import read_table
from lorascope.files.printable import printable
from lorascope.files.typed_json import Count, Finite, to_typed
from lorascope.files.whole_files import write_bytes
from lorascope.runs.folders import own_files
from lorascope.training.state import load_tree, save_tree


@dataclass(frozen=True)
class Best:
    """Best validation result in a checkpoint: its step, the ranks at that step, and the sort key for comparisons."""

    step: Count
    ranks: dict[str, Count]
    key: tuple[float, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint with all that a run needs to resume bit for bit, as ``state`` and the methods return it."""

    finished: Count
    model: dict[str, Any]
    frozen: list[str]
    optimizer: dict[str, Any]
    scheduler: Count
    method: dict[str, Any]
    observers: list[Any]
    generators: dict[str, Any]
    search: Any
    best: Best | None
    seconds: Finite


class Checkpoints:
    """Checkpoints in the folder ``resume/`` of a run folder, and kept ones in ``checkpoints/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path / "resume"
        self.kept_folder = path / "checkpoints"

    def save(self, checkpoint: Checkpoint, table: pd.DataFrame) -> None:
        """Write a checkpoint with the table rows up to it, then remove older ones and their best states."""
        current_files = {_write(self.folder, checkpoint, table)}
        if checkpoint.best is not None:
            current_files.add(self.best_file(checkpoint.best.step))
        for old in self._resume_files() - current_files:
            with suppress(OSError):
                old.unlink()

    def keep(self, checkpoint: Checkpoint, table: pd.DataFrame) -> None:
        """Write a checkpoint that stays when the run finishes, with its best state."""
        if checkpoint.best is not None:
            # A later step may replace the best state, and the end of the run removes its file.
            best = self.best_file(checkpoint.best.step)
            write_bytes(self.kept_folder / best.name, best.read_bytes())
        _write(self.kept_folder, checkpoint, table)

    def kept_steps(self) -> list[int]:
        """Return the steps of the kept checkpoints."""
        return sorted(int(file.stem.removeprefix("step-")) for file in own_files(self.path, "checkpoints/step-*"))

    def read_kept(self, step: int) -> tuple[Checkpoint, pd.DataFrame]:
        """Return the kept checkpoint of a step and the rows up to it."""
        return _read(_step_file(self.kept_folder, step))

    def _resume_files(self) -> set[Path]:
        return own_files(self.path, "resume/step-*", "resume/best-*")

    def remove(self) -> None:
        """Remove all checkpoints but no other files in the folder."""
        with suppress(OSError):
            for file in self._resume_files():
                file.unlink(missing_ok=True)
            self.folder.rmdir()

    def newest(self) -> tuple[Checkpoint, pd.DataFrame] | None:
        """Return the newest intact checkpoint and the rows up to it, or None if the run must start from step 0."""
        # Their names order them, because the numbers of steps are padded with zeros.
        for file in sorted(self.folder.glob("step-*.safetensors"), reverse=True):
            try:
                return _read(file)
            except ValueError as error:
                warnings.warn(f"{printable(error)}; resuming from an earlier step", stacklevel=2)
        return None

    def best_file(self, step: int) -> Path:
        """Return the path of the best state of a step until the run finishes.

        An older best state stays until the next checkpoint: an interruption loses later steps and their best state.
        """
        return self.folder / f"best-{step:08d}.safetensors"


def _step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def _write(folder: Path, checkpoint: Checkpoint, table: pd.DataFrame) -> Path:
    """Write a checkpoint with the rows up to it, and return its file."""
    file, best = _step_file(folder, checkpoint.finished), checkpoint.best
    save_tree(file, vars(checkpoint) | {"best": best and vars(best), "table": pack_rows(table)})
    return file


def _read(file: Path) -> tuple[Checkpoint, pd.DataFrame]:
    """Read a checkpoint and its rows; a ValueError reports a broken file."""
    tree = load_tree(file)
    checkpoint = to_typed(tree, Checkpoint, file)
    if not isinstance(tree.get("table"), np.ndarray):
        raise ValueError(f"cannot read checkpoint {printable(file)}: it has no table")
    return checkpoint, unpack_rows(tree["table"])


def pack_rows(table: pd.DataFrame) -> UInt8[np.ndarray, "bytes"]:
    """Pack a table into an array that a checkpoint can store."""
    rows = io.BytesIO()
    table.to_parquet(rows, index=False)
    return np.frombuffer(rows.getvalue(), np.uint8)


def unpack_rows(packed: UInt8[np.ndarray, "bytes"]) -> pd.DataFrame:
    """Unpack a table of a checkpoint that was packed by ``pack_rows``."""
    return read_table(io.BytesIO(packed.tobytes()), "the table of a checkpoint")
