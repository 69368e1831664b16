"""Files of the evidence: what every judged run scored, and what its values are computed from.

A folder of evidence has

- ``runs.csv``: one row per run, with its arm, seed, settings, machine and scores;
- ``rows.parquet``: one row per test row of each task, with label, group and cluster, without text;
- ``predictions/RUN.npz``: what a run scored on each test row;
- ``kept/NAME/RUN.parquet``: tables from which values other than accuracies and losses are computed;
- ``tuning.csv``, ``values.csv``, ``verdicts.csv``: chosen rates, values by seed and verdicts, computed from the above;
- ``numbers.csv``: the measured numbers that README and docs print;
- ``MANIFEST``: SHA-256 of every file, in the format of ``sha256sum``.

A finished run is written once: its files first, its row in ``runs.csv`` last. An interrupted write leaves no run.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.array_types import Float, Int, Int8
from lorascope.files.file_names import is_plain
from lorascope.files.parquet_tables import read_table
from lorascope.files.printable import printable
from lorascope.files.typed_json import MAX_BYTES, require_small, unreadable
from lorascope.files.whole_files import write_bytes
from lorascope.papers.judging.csv_tables import (
    COUNT,
    FLAG,
    NUMBER,
    ROLE,
    SCHEMA,
    SECONDS,
    TEXT,
    parse_csv,
    read_csv,
    text_table,
    to_csv,
)

RUN_COLUMNS = {
    "run": TEXT, "arm": TEXT, "arm_hash": TEXT, "role": ROLE, "seed": COUNT, "rate": NUMBER, "steps": NUMBER,
    "model": TEXT, "w0": TEXT, "task": TEXT, "task_hash": TEXT, "method": TEXT, "settings": TEXT, "commit": TEXT,
    "dirty": FLAG, "torch": TEXT, "numpy": TEXT, "capability": TEXT, "threads": COUNT, "device": TEXT,
    "cpu_seconds": SECONDS, "trained_parameters": NUMBER, "validation_loss": NUMBER, "validation_metric": NUMBER,
    "validation_chance": NUMBER, "test_loss": NUMBER, "test_metric": NUMBER, "processor": TEXT,
}  # fmt: skip
"""Columns of ``runs.csv``.

A role is "judged", "tuning" or "baseline", such as word counts, which has no seeds and enters with every seed.
``validation_chance`` is the accuracy of always answering with the most frequent class. ``processor`` is empty if the
model of the processor is unknown, as in files that lack the column.
"""
_LATER = ["processor"]  # columns that older files lack
ROW_COLUMNS = ("task_hash", "row", "text", "label", "group", "cluster")
SCORES = {"margin": np.int8, "nll": np.floating}
"""Arrays of ``predictions/RUN.npz`` with their dtypes."""
BLOCK = ["capability", "torch", "threads", "device"]
"""Columns that identify a machine: a seed gives other numbers where one of them differs.

Another processor of the same instruction set only rounds differently, so it is not one of them.
"""


@dataclass(eq=False)
class Evidence:
    """Kept runs with their predictions and kept tables.

    Parameters
    ----------
    runs : DataFrame
        One row per run, with ``RUN_COLUMNS``.
    rows : DataFrame
        ``task_hash, row, text, label, group, cluster``: the test rows of each task.
    margins : mapping run -> array (row,)
        Logit of the right class minus the largest other one, in steps of 1/32, rounded away from zero and clipped. A
        row is right if it is above zero.
    nll : mapping run -> array (row,)
        Negative log-likelihood of each row in nats, of the runs whose loss a claim uses.
    kept : mapping name -> mapping run -> DataFrame
        Tables that statistics read.
    """

    runs: pd.DataFrame
    rows: pd.DataFrame
    # Tasks have different numbers of rows, so the dimension has no name.
    margins: Mapping[str, Int8[np.ndarray, "_"]] = field(default_factory=dict)
    nll: Mapping[str, Float[np.ndarray, "_"]] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, pd.DataFrame]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Judged runs of an arm have one rate, so a second run of a seed is a duplicate at any rate.
        tuning = self.runs["role"] == "tuning"
        keys = self.runs.assign(tuning=tuning, rate=self.runs["rate"].where(tuning))
        twice = keys[keys.duplicated(["arm", "seed", "tuning", "rate", *BLOCK])]
        if len(twice):
            raise ValueError(
                f"runs.csv: runs must be unique, got two of arm {twice['arm'].iloc[0]!r}, seed {twice['seed'].iloc[0]}"
            )
        if len(ids := self.runs["run"][self.runs["run"].duplicated()]):
            raise ValueError(f"runs.csv: run ids must be unique, got {printable(ids.iloc[0])!r} twice")
        judged, baselines = self.judged, self.runs[self.runs["role"] == "baseline"]
        self._runs = dict(zip(zip(judged["arm"], judged["seed"], strict=True), judged["run"], strict=True))
        # Judging asks for the runs of each machine once per claim.
        self._by_block: dict[tuple[Any, ...], Evidence] = {}
        self._baselines = dict(zip(baselines["arm"], baselines["run"], strict=True))

    @property
    def judged(self) -> pd.DataFrame:
        """Rows of the judged runs."""
        return self.runs[self.runs["role"] == "judged"]

    def in_block(self, block: Mapping[str, Any]) -> Evidence:
        """Return the runs of one machine, and the baselines."""
        key = tuple(block[name] for name in BLOCK)
        if key not in self._by_block:
            same = np.logical_and.reduce([self.runs[name] == block[name] for name in BLOCK])
            runs = self.runs[same | (self.runs["role"] == "baseline")]
            self._by_block[key] = Evidence(runs, self.rows, self.margins, self.nll, self.kept)
        return self._by_block[key]

    def blocks(self) -> list[dict[str, Any]]:
        """Return the machines on which judged runs were trained, in the order of the table."""
        machines: list[Any] = self.judged[BLOCK].drop_duplicates().to_dict("records")
        return machines

    def of_main_machine(self) -> Evidence:
        """Return the runs of the machine with the most judged runs, the first one if several have as many."""
        machines = [self.in_block(block) for block in self.blocks()]
        return max(machines, key=lambda machine: len(machine.judged), default=self)

    def seeds(self, arms: Iterable[str], first: int) -> list[int]:
        """Return the seeds from ``first`` on that all arms have, up to the first one that is missing."""
        varied = set(arms) - self._baselines.keys()  # a baseline is the same for every seed
        stop = first
        while varied and all((arm, stop) in self._runs for arm in varied):
            stop += 1
        return list(range(first, stop))

    def has(self, arm: str, seed: int) -> bool:
        """Return whether an arm has a judged run with this seed, or is a baseline."""
        return arm in self._baselines or (arm, seed) in self._runs

    def run(self, arm: str, seed: int) -> str:
        """Return the id of a run; a baseline is the same for all seeds.

        Raises
        ------
        KeyError
            The arm has no run with this seed.
        """
        return self._baselines.get(arm) or self._runs[arm, seed]

    def correct(self, arm: str, seed: int) -> Float[np.ndarray, "row"]:
        """Return 1 for each test row that the run got right, else 0."""
        # A margin of 0 is a tie, which counts as wrong.
        return (_of_run(self.margins, self.run(arm, seed), "margins") > 0).astype(np.float64)

    def losses(self, arm: str, seed: int) -> Float[np.ndarray, "row"]:
        """Return the negative log-likelihood of each test row in nats."""
        return _of_run(self.nll, self.run(arm, seed), "losses").astype(np.float64)  # kept in float16

    def table(self, name: str, arm: str, seed: int) -> pd.DataFrame:
        """Return the kept table of a run."""
        return _of_run(self.kept.get(name, {}), self.run(arm, seed), f"table {name!r}")

    def clusters(self, arm: str, seed: int) -> Int[np.ndarray, "row"]:
        """Return the cluster of each test row of a run's task, numbered from 0."""
        task = self.runs.loc[self.runs["run"] == self.run(arm, seed), "task_hash"].iloc[0]
        rows = self.rows[self.rows["task_hash"] == task].sort_values("row")
        return pd.factorize(rows["cluster"])[0]


def _of_run(by_run: Mapping[str, Any], run: str, name: str) -> Any:
    """Return what is kept of a run."""
    if run not in by_run:
        raise ValueError(f"the evidence lacks the {name} of run {printable(run)}: restore the file from a copy")
    return by_run[run]


def read(folder: str | Path) -> Evidence:
    """Read the kept runs of a folder of evidence.

    Raises
    ------
    FileNotFoundError
        The folder has no ``runs.csv``.
    ValueError
        A file has another schema, is damaged or missing, or two rows describe the same run.
    """
    folder = Path(folder)
    runs = read_csv(folder / "runs.csv", RUN_COLUMNS, _LATER)
    rows = _read_rows(folder / "rows.parquet")
    scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in SCORES}
    for run in runs["run"]:
        if not is_plain(run):  # an id such as ../x would name a file outside of the folder
            raise unreadable(folder / "runs.csv", f"invalid run id {printable(run)!r}")
        if (file := folder / "predictions" / f"{run}.npz").exists():
            for name, values in _read_scores(file).items():
                scores[name][run] = values
    kept_tables = {}
    for path in sorted(filter(Path.is_dir, folder.glob("kept/*"))):
        kept_tables[path.name] = {file.stem: read_table(file, file) for file in sorted(path.glob("*.parquet"))}
    if scores["margin"] and not len(rows):
        raise unreadable(folder / "rows.parquet", "it has no test rows, but there are predictions of them")
    return Evidence(runs, rows, scores["margin"], scores["nll"], kept_tables)


def read_kept(folder: Path) -> Evidence:
    """Read the kept runs of a folder of evidence; without a ``runs.csv``, return the evidence of no runs."""
    if (folder / "runs.csv").exists():
        return read(folder)
    return Evidence(pd.DataFrame(columns=list(RUN_COLUMNS)), pd.DataFrame())


def _read_rows(file: Path) -> pd.DataFrame:
    if not file.exists():
        return pd.DataFrame(columns=list(ROW_COLUMNS))
    rows = read_table(file, file)
    if different := sorted(set(rows.columns) ^ set(ROW_COLUMNS)):
        raise unreadable(file, f"its columns differ from schema {SCHEMA}: {', '.join(map(printable, different))}")
    if len(twice := rows[rows.duplicated(["task_hash", "row"])]):
        raise unreadable(file, f"row {printable(twice['row'].iloc[0])} of a task occurs twice")
    return rows


def _read_scores(file: Path) -> dict[str, np.ndarray]:
    require_small(file, MAX_BYTES)
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            # A small archive can expand to any size.
            if (size := sum(member.file_size for member in arrays.zip.infolist())) > MAX_BYTES:
                raise ValueError(f"its arrays must have <= {MAX_BYTES} bytes, got {size}")
            scores = dict(arrays)
    except Exception as error:  # a damaged archive raises BadZipFile, EOFError, OSError, ValueError and others
        raise unreadable(file, printable(error)) from error
    for name, values in scores.items():
        if name not in SCORES:
            raise unreadable(file, f"unknown array {printable(name)!r}, expected {' or '.join(SCORES)}")
        # Only NaN is not equal to itself.
        if values.ndim != 1 or not np.issubdtype(values.dtype, SCORES[name]) or (values != values).any():
            raise unreadable(file, f"{name} must be a vector of dtype {SCORES[name].__name__} without NaN")
    return scores


def add_run(
    folder: str | Path, row: Mapping[str, Any], scores: Mapping[str, np.ndarray], tables: Mapping[str, pd.DataFrame]
) -> None:
    """Add a finished run to the kept runs; its files are complete before its row appears in ``runs.csv``.

    Parameters
    ----------
    folder : path
        Folder of evidence.
    row : mapping
        A value for each of ``RUN_COLUMNS``.
    scores : mapping
        ``margin`` and ``nll`` of the test rows, as far as claims use them.
    tables : mapping name -> DataFrame
        Kept tables, which statistics read.

    Raises
    ------
    ValueError
        The folder has this run with other numbers. Equal ones are left as they are.
    """
    folder, run = Path(folder), str(row["run"])
    file = folder / "runs.csv"
    runs = read_csv(file, RUN_COLUMNS, _LATER) if file.exists() else pd.DataFrame(columns=list(RUN_COLUMNS))
    new = pd.DataFrame([row])[list(RUN_COLUMNS)]
    if (runs["run"] == run).any():
        # The new row is compared as it would be read. Time and processor of a run may differ whenever it is trained.
        old, parsed = runs[runs["run"] == run], parse_csv(to_csv(new), RUN_COLUMNS)
        ignored: dict[str, Any] = {"cpu_seconds": 0.0, "processor": ""}
        if to_csv(old.assign(**ignored)) != to_csv(parsed.assign(**ignored)):
            raise ValueError(f"cannot add run {printable(run)}: {printable(file)} has it with other numbers")
        return
    if scores:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **scores)
        write_bytes(folder / "predictions" / f"{run}.npz", buffer.getvalue())
    for name, table in tables.items():
        _write_table(folder / "kept" / name / f"{run}.parquet", table)
    # Runs stay in the order in which they finished, which decides the judging machine. Earlier rows stay texts, so that
    # no number of theirs changes.
    earlier = to_csv(new.head(0))
    if file.exists():
        earlier = file.read_bytes()
        if missing := [name for name in _LATER if name not in text_table(earlier)]:
            earlier = to_csv(text_table(earlier).assign(**dict.fromkeys(missing, "")))
    write_bytes(file, earlier + new.to_csv(index=False, header=False, lineterminator="\n").encode())


def add_rows(folder: Path, rows: pd.DataFrame) -> None:
    """Add the test rows of a task to those of the kept runs, if the folder lacks them."""
    file = folder / "rows.parquet"
    old_rows = read_table(file, file) if file.exists() else rows.head(0)
    # The hash of a task covers all its rows, so a known task has the same ones.
    if not set(rows["task_hash"]) <= set(old_rows["task_hash"]):
        _write_table(file, pd.concat([old_rows, rows], ignore_index=True))


def _write_table(file: Path, table: pd.DataFrame) -> None:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")
    write_bytes(file, buffer.getvalue())
