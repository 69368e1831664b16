"""The checkpoints of an unfinished run: one file each, of which the newest whole one counts."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import UInt8

from lorascope.files.parquet_tables import read_table
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import write_bytes
from lorascope.files.typed_json import Count, Finite, to_typed
from lorascope.runs.folders import own_files
from lorascope.training.state import load_tree, save_tree


@dataclass(frozen=True)
class Best:
    """The best validation result yet: its step, the ranks then, and what it is compared by."""

    step: Count
    ranks: dict[str, Count]
    key: tuple[float, ...]


@dataclass(frozen=True)
class Checkpoint:
    """All that is needed to go on bit for bit; the parts are those of ``state`` and of the methods."""

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
    """The folder ``resume/`` of a run.

    Parameters
    ----------
    path : path
        The run folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path / "resume"

    def save(self, checkpoint: Checkpoint, table: pd.DataFrame) -> None:
        """Write a checkpoint and the rows up to it; only then are older ones and their best states removed."""
        file = self.folder / f"step-{checkpoint.finished:08d}.safetensors"
        best = checkpoint.best
        tree = vars(checkpoint) | {"best": best and vars(best), "table": pack_rows(table)}
        save_tree(file, tree)
        kept = {file} if best is None else {file, self.best_file(best.step)}
        for old in self._resume_files() - kept:
            with suppress(OSError):
                old.unlink()

    def _resume_files(self) -> set[Path]:
        return own_files(self.path, "resume/step-*", "resume/best-*")

    def remove(self) -> None:
        """Remove all checkpoints; other files in the folder stay."""
        with suppress(OSError):
            for file in self._resume_files():
                file.unlink(missing_ok=True)
            self.folder.rmdir()

    def newest(self) -> tuple[Checkpoint, pd.DataFrame] | None:
        """The newest whole checkpoint and the rows up to it; None where a run must begin at the beginning."""
        for file in sorted(self.folder.glob("step-*.safetensors"), reverse=True):
            try:
                tree = load_tree(file)
                checkpoint = to_typed(tree, Checkpoint, file)
                if not isinstance(tree.get("table"), np.ndarray):
                    raise ValueError(f"{printable(file)} is no checkpoint: it holds no table")
                return checkpoint, unpack_rows(tree["table"])
            except ValueError as error:
                warnings.warn(f"{printable(error)}; going on from an earlier step", stacklevel=2)
        return None

    def best_file(self, step: int) -> Path:
        """Where the best state waits for the end: a later one may yet be lost together with the steps to it."""
        return self.folder / f"best-{step:08d}.safetensors"

    def keep_best(self, step: int) -> None:
        """Put the best state to where a finished run has it."""
        write_bytes(self.path / "state/best.safetensors", self.best_file(step).read_bytes())


def pack_rows(table: pd.DataFrame) -> UInt8[np.ndarray, "bytes"]:
    """A table as a state can keep it."""
    rows = io.BytesIO()
    table.to_parquet(rows, index=False)
    return np.frombuffer(rows.getvalue(), np.uint8)


def unpack_rows(packed: UInt8[np.ndarray, "bytes"]) -> pd.DataFrame:
    """The table that ``pack_rows`` got."""
    return read_table(io.BytesIO(packed.tobytes()), "the table of a checkpoint")
