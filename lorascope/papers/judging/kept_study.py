"""Kept runs of the second edition: what every run scored, and the tables that its statistics read.

A folder has, after ``compact``,

- ``runs.csv.gz``: one row per run, phase and task, with ``STUDY_COLUMNS``;
- ``NAME.parquet``: tables in long form, such as ``losses`` and ``ranks``; their first columns are ``arm, seed, run``;
- ``right.npz``, ``rows.parquet``: packed bits of the test rows that each run got right, and these rows.

A finished run first becomes one file in ``added``, which contains everything of the run. A killed process therefore
leaves a whole run or none. ``compact`` writes these runs into the files above before it removes theirs. A run that is
in both is read from ``added``, so the folder can be read at any time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.array_types import Float, Int, UInt8
from lorascope.files.file_names import is_plain
from lorascope.files.parquet_tables import read_table
from lorascope.files.printable import printable
from lorascope.files.typed_json import unreadable
from lorascope.files.whole_files import write_bytes
from lorascope.papers.judging.csv_tables import COUNT, NUMBER, ROLE, TEXT, parse_csv, to_csv

STUDY_COLUMNS = {
    "run": TEXT, "arm": TEXT, "arm_hash": TEXT, "role": ROLE, "seed": COUNT, "rate": NUMBER, "phase": TEXT,
    "task": TEXT, "gap": NUMBER, "base_gap": NUMBER, "accuracy": NUMBER, "majority": NUMBER, "loss": NUMBER,
    "first_loss": NUMBER, "commit": TEXT, "cpu_seconds": NUMBER, "processor": TEXT, "capability": TEXT, "torch": TEXT,
    "threads": COUNT, "device": TEXT,
}  # fmt: skip
"""Columns of ``runs.csv.gz`` with their kinds of values.

A role is "judged" or "tuning". The phase is "" for the last one, which is judged, and the task is "" for a single one.
``gap`` and ``base_gap`` are in nats, ``accuracy`` and ``majority`` (of the most frequent class) are fractions.
"""
_DTYPES = {name: kind.dtype for name, kind in STUDY_COLUMNS.items()}
FIRST_SEED = 200  # of the judged runs of all arms
INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""Environment of all runs, so that they do not depend on the instructions that a processor has beyond these."""
_ADDED = "added"
_KEY = ["arm", "arm_hash", "role", "seed", "rate"]  # one value per run


@dataclass(frozen=True, eq=False)
class StudyRun:
    """A finished run, as it is added to a folder.

    Parameters
    ----------
    rows : DataFrame
        One row per phase and task, with ``STUDY_COLUMNS``. Missing columns are empty; ``arm_hash`` is the
        registered one.
    losses : DataFrame
        ``phase, step, loss``: training loss, kept in float16.
    tables : mapping name -> DataFrame
        Other tables; ``arm, seed, run`` are added to them.
    right : array (row,) or None
        Whether each test row is right, for text.
    rows_of_task : DataFrame or None
        The test rows in the same order, with ``cluster``, and with ``task`` if there are several.
    """

    rows: pd.DataFrame
    losses: pd.DataFrame
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    right: np.ndarray | None = None
    rows_of_task: pd.DataFrame | None = None


@dataclass(frozen=True, eq=False)
class StudyEvidence:
    """Kept runs with their tables.

    Parameters
    ----------
    runs : DataFrame
        One row per run, phase and task, with ``STUDY_COLUMNS``.
    tables : mapping name -> DataFrame
        Tables of all runs, with ``arm, seed, run`` first.
    right : mapping run -> array (byte,)
        Packed bits of the test rows that are right.
    rows : DataFrame
        Test rows: ``tasks, row, task, cluster`` and others. ``tasks`` joins the tasks of a run, see ``clusters``.
    """

    runs: pd.DataFrame
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    right: Mapping[str, UInt8[np.ndarray, "_"]] = field(default_factory=dict)
    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    _tables_by_run: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Judged runs of an arm have one rate, so a second run of a seed is a duplicate at any rate.
        keys = self.runs.assign(rate=self.runs["rate"].where(self.runs["role"] == "tuning"))
        twice = keys[keys.duplicated(["arm", "seed", "role", "rate", "phase", "task"])]
        if len(twice):
            row = twice.iloc[0]
            raise ValueError(f"runs must be unique, got two of arm {row['arm']!r}, seed {row['seed']}")

    @cached_property
    def _judged(self) -> dict[tuple[str, int], pd.DataFrame]:
        judged = self.runs[self.runs["role"] == "judged"]
        return dict(iter(judged.groupby(["arm", "seed"])))  # type: ignore[arg-type]

    @cached_property
    def _phases(self) -> dict[tuple[str, int, str], pd.DataFrame]:
        judged = self.runs[self.runs["role"] == "judged"]
        return dict(iter(judged.groupby(["arm", "seed", "phase"])))  # type: ignore[arg-type]

    def judged(self, arm: str, seed: int) -> pd.DataFrame:
        """Return the rows of the judged run of an arm, one per phase and task.

        Raises
        ------
        KeyError
            The arm has no judged run with this seed.
        """
        return self._judged[arm, seed]

    def run(self, arm: str, seed: int) -> str:
        """Return the id of the judged run of an arm; see ``judged``."""
        return str(self.judged(arm, seed)["run"].iloc[0])

    def has(self, arm: str, seed: int) -> bool:
        """Return whether an arm has a judged run with this seed."""
        return (arm, seed) in self._judged

    def seeds(self, arm: str) -> list[int]:
        """Return the seeds of the judged runs of an arm in increasing order."""
        return sorted(seed for label, seed in self._judged if label == arm)

    def of_phase(self, arm: str, seed: int, phase: str = "") -> pd.DataFrame:
        """Return the rows of a judged run in one phase, one per task; "" is the last phase, which is judged."""
        if (arm, seed, phase) not in self._phases:
            raise ValueError(f"{printable(arm)!r} has no judged run with seed {seed} and phase {printable(phase)!r}")
        return self._phases[arm, seed, phase]

    def closed(self, arm: str, seed: int, phase: str = "") -> float:
        """Return the gap closed in points, 100 (1 - gap / gap of the base), averaged over tasks."""
        rows = self.of_phase(arm, seed, phase)
        return float(np.mean(100 * (1 - rows["gap"].to_numpy() / rows["base_gap"].to_numpy())))

    def final_loss(self, arm: str, seed: int) -> float:
        """Return the loss at the end, averaged over tasks."""
        return float(np.mean(self.of_phase(arm, seed)["loss"].to_numpy()))

    def table(self, name: str, arm: str, seed: int) -> pd.DataFrame:
        """Return the rows of a table that belong to the judged run of an arm."""
        run = self.run(arm, seed)
        if name not in self._tables_by_run:
            # Grouped once, because a table has the rows of more than a thousand runs.
            table = self.tables.get(name, pd.DataFrame(columns=["run"]))
            self._tables_by_run[name] = dict(iter(table.groupby("run", sort=False)))  # type: ignore[arg-type]
        if run not in self._tables_by_run[name]:
            raise ValueError(f"the evidence lacks the table {printable(name)!r} of run {printable(run)}")
        return self._tables_by_run[name][run]

    def test_rows(self, arm: str, seed: int) -> pd.DataFrame:
        """Return the test rows of a judged run, in their order."""
        tasks = _joined_tasks(self.judged(arm, seed))
        # Without a text run, the table of rows has no columns.
        if self.rows.empty or not (is_of_run := self.rows["tasks"] == tasks).any():
            raise ValueError(f"the evidence lacks the test rows of {printable(arm)!r}, seed {seed}")
        return self.rows[is_of_run].sort_values("row")

    def correct(self, arm: str, seed: int) -> Float[np.ndarray, "row"]:
        """Return 100 for each test row that the run got right, else 0: points of accuracy."""
        run = self.run(arm, seed)
        # The last byte is padded, so the number of rows comes from their table.
        if run not in self.right:
            raise ValueError(f"the evidence lacks the right rows of run {printable(run)}")
        return 100.0 * np.unpackbits(self.right[run], count=len(self.test_rows(arm, seed)))

    def clusters(self, arm: str, seed: int) -> Int[np.ndarray, "row"]:
        """Return the cluster of each test row of a run's tasks, numbered from 0."""
        return pd.factorize(self.test_rows(arm, seed)["cluster"])[0]


def _joined_tasks(rows: pd.DataFrame) -> str:
    """Join the names of the tasks of a run, which have their test rows in common with other runs on these tasks."""
    return " + ".join(sorted(set(rows["task"])))


def read(folder: str | Path) -> StudyEvidence:
    """Read the kept runs of a folder, those that ``compact`` has not merged included; an empty folder has none.

    Raises
    ------
    ValueError
        A file is damaged or has other columns, or two runs are of the same arm, seed and role.
    """
    folder = Path(folder)
    # Added runs first: one that is merged and removed meanwhile is in the merged files.
    added = [run for file in _added_files(folder) if (run := _read_added(file)) is not None]
    runs = [_read_runs(folder)]
    tables: dict[str, list[pd.DataFrame]] = {}
    for file in sorted(folder.glob("*.parquet")):
        tables[file.stem] = [read_table(file, file)]
    row_sets = tables.pop("rows", [])
    right = _read_right(folder / "right.npz")
    ids = []
    for run in added:
        id = run.rows["run"].iloc[0]
        ids.append(id)
        runs.append(run.rows)
        for name, table in (*run.tables.items(), ("losses", run.losses)):
            tables.setdefault(name, [table.head(0)]).append(table)
        if run.right is not None and run.rows_of_task is not None:
            right[id] = run.right
            row_sets.append(run.rows_of_task)
    merged_tables = {name: _merge(frames, ids) for name, frames in tables.items()}
    rows = pd.DataFrame()
    if row_sets:  # runs on the same tasks have the same rows
        rows = pd.concat(row_sets).drop_duplicates(["tasks", "row"], ignore_index=True)
    return StudyEvidence(_merge(runs, ids), merged_tables, right, rows)


def _merge(tables: list[pd.DataFrame], added: list[str]) -> pd.DataFrame:
    """Concatenate a merged table with those of added runs, whose rows in the merged one are left out."""
    merged, *of_added_runs = tables
    # A process that was killed while merging leaves runs in both.
    return pd.concat([merged[~merged["run"].isin(added)], *of_added_runs], ignore_index=True)


def add_run(folder: str | Path, run: StudyRun) -> None:
    """Add a finished run to a folder, atomically.

    Raises
    ------
    ValueError
        The run is incomplete, or the folder has a run of this arm, seed and role (and rate, for tuning) with other
        numbers. A run with equal numbers is left as it is.
    """
    folder = Path(folder)
    run = _checked(run)
    head = run.rows.iloc[0]
    key = ["arm", "role", "seed"]
    if head["role"] == "tuning":  # judged runs of an arm have one rate
        key.append("rate")
    digest = hashlib.sha256("\n".join(map(str, head[key])).encode()).hexdigest()
    file = folder / _ADDED / f"{digest[:20]}.zip"
    # A run of this key may be merged already, under any id.
    merged = _read_runs(folder)
    earlier = merged[(merged[key] == head[key]).all(axis=1)]
    if file.exists() and (added := _read_added(file)) is not None:
        earlier = added.rows
    if len(earlier):
        # The time and the code of a run may differ when it is trained a second time.
        old, new = (rows.drop(columns=["cpu_seconds", "commit"]).reset_index(drop=True) for rows in (earlier, run.rows))
        if not old.equals(new):
            raise ValueError(f"cannot add run {head['run']}: {printable(folder)} has it with other numbers")
        return
    write_bytes(file, _pack(run))


def _checked(run: StudyRun) -> StudyRun:
    """Return a run with all columns and their dtypes; raise a ValueError if it is incomplete."""
    if unknown := sorted(set(run.rows.columns) - STUDY_COLUMNS.keys()):
        raise ValueError(f"rows of a run must have the columns of STUDY_COLUMNS, got {', '.join(unknown)}")
    if not len(run.rows):
        raise ValueError("a run must have >= 1 row, got none")
    empty = pd.DataFrame(index=run.rows.index)
    values: dict[str, Any] = {"str": "", "int64": 0}
    for name, dtype in _DTYPES.items():
        empty[name] = values.get(dtype, np.nan)
    rows = empty.assign(**run.rows).astype(_DTYPES).reset_index(drop=True)
    head = rows.iloc[0]
    if (rows[["run", *_KEY]].nunique(dropna=False) > 1).any():
        raise ValueError(f"the rows of a run must agree in run, {', '.join(_KEY)}: run {printable(head['run'])}")
    if not is_plain(head["run"]) or head["role"] not in ("judged", "tuning"):
        raise ValueError(f"invalid run id or role: {printable(head['run'])!r}, {printable(head['role'])!r}")
    # The statistics read the last phase.
    if (rows["phase"] != "").all():
        raise ValueError(f"a run must have rows of phase '', the last one: run {head['run']}")
    labels = {name: head[name] for name in ("arm", "seed", "run")}
    # Enough for a figure, at a quarter of the size.
    losses = run.losses[["phase", "step", "loss"]].astype({"phase": "str", "step": "int64", "loss": np.float16})
    tables = {name: _labeled(table, labels) for name, table in run.tables.items()}
    if "rows" in tables or not all(map(is_plain, tables)):
        raise ValueError(f"names of tables must be plain file names other than 'rows', got {', '.join(tables)}")
    right, task_rows = run.right, run.rows_of_task
    if (right is None) != (task_rows is None):
        raise ValueError(f"right and rows_of_task must be given together: run {head['run']}")
    if right is not None and task_rows is not None:
        if len(right) != len(task_rows) or "cluster" not in task_rows:
            raise ValueError(f"rows_of_task must have a cluster for each of {len(right)} rows: run {head['run']}")
        right = np.packbits(np.asarray(right, dtype=bool))
        task = task_rows.get("task", "")
        task_rows = task_rows.assign(task=task, tasks=_joined_tasks(rows), row=np.arange(len(task_rows)))
        task_rows = task_rows[["tasks", "row", *task_rows.columns.drop(["tasks", "row"])]]
    return StudyRun(rows, _labeled(losses, labels), tables, right, task_rows)


def _labeled(table: pd.DataFrame, labels: Mapping[str, Any]) -> pd.DataFrame:
    table = table.drop(columns=list(labels), errors="ignore")
    return pd.DataFrame(dict.fromkeys(labels), index=table.index).assign(**labels).join(table).reset_index(drop=True)


def _pack(run: StudyRun) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("runs.csv", to_csv(run.rows))
        tables = {**run.tables, "losses": run.losses}
        if run.right is not None and run.rows_of_task is not None:
            tables["rows"] = run.rows_of_task
            archive.writestr("right", run.right.tobytes())
        for name, table in tables.items():
            archive.writestr(f"{name}.parquet", _parquet_bytes(table))
    return content.getvalue()


def _added_files(folder: Path) -> list[Path]:
    return sorted((folder / _ADDED).glob("*.zip"))


def _read_added(file: Path) -> StudyRun | None:
    """Read a run that was not merged yet; None if it was merged and removed meanwhile."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise unreadable(file, printable(error)) from error
    tables = {}
    for name, member in members.items():
        if name.endswith(".parquet"):
            tables[name.removesuffix(".parquet")] = read_table(io.BytesIO(member), f"{file.name}/{name}")
    rows = parse_csv(members["runs.csv"], STUDY_COLUMNS)
    right = np.frombuffer(members["right"], np.uint8) if "right" in members else None
    return StudyRun(rows, tables.pop("losses"), rows_of_task=tables.pop("rows", None), tables=tables, right=right)


def _read_runs(folder: Path) -> pd.DataFrame:
    file = folder / "runs.csv.gz"
    if not file.exists():
        return pd.DataFrame(columns=list(STUDY_COLUMNS)).astype(_DTYPES)
    try:
        return parse_csv(gzip.decompress(file.read_bytes()), STUDY_COLUMNS)
    except (OSError, EOFError, ValueError) as error:
        raise unreadable(file, printable(error)) from error


def _read_right(file: Path) -> dict[str, np.ndarray]:
    if not file.exists():
        return {}
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise unreadable(file, printable(error)) from error


def compact(folder: str | Path) -> None:
    """Merge the added runs into the files of the folder, sorted by arm and seed, and remove theirs.

    Only one process may merge at a time; others may add and read runs meanwhile.
    """
    folder = Path(folder)
    files = _added_files(folder)
    write(folder, read(folder))
    # Last, because until here a killed merge changes nothing that is read.
    for file in files:
        file.unlink()
    if (folder / _ADDED).exists() and not any((folder / _ADDED).iterdir()):
        (folder / _ADDED).rmdir()


def write(folder: Path, evidence: StudyEvidence) -> None:
    """Write evidence as the merged files of a folder."""
    for name, table in evidence.tables.items():
        write_bytes(folder / f"{name}.parquet", _parquet_bytes(_sorted(table)))
    if evidence.right:
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **dict(sorted(evidence.right.items())))
        write_bytes(folder / "right.npz", content.getvalue())
        write_bytes(folder / "rows.parquet", _parquet_bytes(evidence.rows))
    # Without a time in its header, the same runs give the same file.
    write_bytes(folder / "runs.csv.gz", gzip.compress(to_csv(_sorted(evidence.runs)), mtime=0))


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values(["arm", "seed", "run"], kind="stable", ignore_index=True)


def _parquet_bytes(table: pd.DataFrame) -> bytes:
    content = io.BytesIO()
    table.to_parquet(content, index=False, compression="zstd")
    return content.getvalue()
