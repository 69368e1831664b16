"""Run the probes asked for, side by side, and write the report of what they find."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from joblib import Parallel, delayed

from lorascope.experiments.sweep import Job, run_jobs, width
from lorascope.files.parquet_tables import read_table
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import is_plain, write_bytes, write_json
from lorascope.files.typed_json import read_json
from lorascope.inputs import models
from lorascope.probes.base import PROBES, Arm, Findings
from lorascope.probes.claims import Verdict
from lorascope.probes.report import page
from lorascope.runs.run import Run
from lorascope.runs.writer import remove_states

QUICK_SEEDS = 2
# Which runs in a folder belong to which arm of which probe.
CONTENTS = "probes.json"
REPORT = "report.html"


@dataclass(frozen=True)
class _Contents:
    """What ``probes.json`` holds: names of run folders by probe and label."""

    quick: bool
    probes: dict[str, dict[str, list[str]]]


@dataclass(frozen=True)
class Outcome:
    """What ``reproduce`` found: the verdicts of each probe, and where the report lies."""

    path: Path
    verdicts: Mapping[str, Sequence[Verdict]]

    def plain(self) -> dict[str, Any]:
        """For a program."""
        listed: list[dict[str, Any]] = [
            {"probe": name, "claim": verdict.claim.sentence, "outcome": verdict.outcome, "margin": verdict.claim.margin}
            | {
                "effect": verdict.effect,
                "low": _nan_to_none(verdict.low),
                "high": _nan_to_none(verdict.high),
                "n": verdict.n,
            }
            for name, verdicts in self.verdicts.items()
            for verdict in verdicts
        ]
        return {"report": str(self.path), "claims": listed}

    def __str__(self) -> str:
        lines = [
            f"{name}: {verdict.claim.sentence}\n    {verdict}"
            for name, verdicts in self.verdicts.items()
            for verdict in verdicts
        ]
        return "\n".join([*lines, "", f"report: {printable(self.path)}"])


def _nan_to_none(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value


def reproduce(names: Sequence[str], quick: bool, seeds: int | None, out: str | Path) -> Outcome:
    """Train what the probes need, judge their claims, and write the report.

    Parameters
    ----------
    names : sequence of str
        Probes; all of them if empty.
    quick : bool
        Few steps and seeds: shows that everything works, decides nothing.
    seeds : int or None
        Seeds of each arm; by default 2 if quick, else what each probe asks for.
    out : path
        Runs lie in ``out/runs``; runs that are there already are not trained again. The states of runs without
        adapters are removed: each is a copy of the model.

    Returns
    -------
    Outcome
        The verdicts, and where the report lies.

    Raises
    ------
    FileExistsError
        A report.html that lorascope did not write is in ``out``.
    ValueError
        An unknown probe, or a probes.json that lorascope did not write.
    """
    unknown = [name for name in names if name not in PROBES]
    if unknown:
        raise ValueError(f"unknown probe {unknown[0]!r}; there are {', '.join(PROBES)}")
    chosen = {name: PROBES[name] for name in names or PROBES}
    page.require_ours(Path(out) / REPORT)
    if (file := Path(out) / CONTENTS).exists():
        read_json(file, _Contents)
    arms = {name: probe.arms(quick) for name, probe in chosen.items()}
    count = {name: seeds or (QUICK_SEEDS if quick else probe.seeds) for name, probe in chosen.items()}
    wanted = [(arm, seed) for name, found in arms.items() for arm in found for seed in range(count[name])]
    runs = _train_arms(wanted, Path(out) / "runs")
    folders = {
        name: {arm.label: [runs[arm.label, seed] for seed in range(count[name])] for arm in found}
        for name, found in arms.items()
    }
    write_json(Path(out) / CONTENTS, {"quick": quick, "probes": folders})
    _measure_missing(out)
    return write_report(out)


def write_report(out: str | Path) -> Outcome:
    """Judge the runs of an earlier ``reproduce`` and write their report, training nothing.

    Raises
    ------
    FileNotFoundError
        The folder is none that ``reproduce`` filled, or lacks a run.
    """
    quick, runs = _read_contents(out)
    found = _judge(out, runs)
    path = page.write(Path(out) / REPORT, found, runs, quick=quick)
    return Outcome(path, {name: each.verdicts for name, each in found.items()})


def findings(out: str | Path) -> dict[str, Findings]:
    """What each probe finds in the runs of an earlier ``reproduce``, charts and all; errors as of ``write_report``."""
    return _judge(out, _read_contents(out)[1])


def _judge(out: str | Path, runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> dict[str, Findings]:
    found = {}
    for name, labelled in runs.items():
        files = {run.id: _measured_file(out, name, run) for run in _measurable_runs(name, labelled)}
        tables = {id: read_table(file, file) for id, file in files.items()}
        try:
            found[name] = PROBES[name].judge(labelled, tables) if tables else PROBES[name].judge(labelled)
        except KeyError as error:
            raise ValueError(
                f"cannot judge {name}: its runs or its tables in {printable(Path(out) / 'measured')} lack "
                f"{printable(error)}"
            ) from error
    return found


def _read_contents(out: str | Path) -> tuple[bool, dict[str, dict[str, list[Run]]]]:
    """Were these quick settings, and the runs of each probe by arm."""
    file = Path(out) / CONTENTS
    if not file.exists():
        raise FileNotFoundError(f"{out} was not filled by reproduce: it has no {CONTENTS}")
    contents = read_json(file, _Contents)
    if unknown := sorted(contents.probes.keys() - PROBES.keys()):
        raise ValueError(f"cannot read {printable(file)}: unknown probe {printable(unknown[0])!r}")
    return contents.quick, {
        name: {
            label: [_find_run(Path(out) / "runs", folder, file) for folder in found] for label, found in labels.items()
        }
        for name, labels in contents.probes.items()
    }


def _find_run(root: Path, folder: str, file: Path) -> Run:
    """A run of the folder, by its name or by those of a recipe and of a phase."""
    if not all(map(is_plain, folder.split("/"))):
        raise ValueError(
            f"cannot read {printable(file)}: a run must be in {printable(root)}, got {printable(folder)!r}"
        )
    return Run.read(root / folder)


def _train_arms(wanted: Sequence[tuple[Arm, int]], root: Path) -> dict[tuple[str, int], str]:
    """Names of the run folders by label of the arm and seed; an arm that two probes share is trained once.

    Raises
    ------
    ValueError
        Two arms have one label, but are not the same.
    """
    by_label: dict[str, Arm] = {}
    for arm, _ in wanted:
        if by_label.setdefault(arm.label, arm) != arm:
            raise ValueError(f"two probes mean different arms by {arm.label!r}: give them different labels")
    jobs = {(arm.label, seed): _job(arm, seed, root) for arm, seed in wanted}
    runs = run_jobs(list(jobs.values()), ended=_remove_copies)
    # A recipe of several phases is told by its last one, which lies in the recipe's folder.
    return {key: run.path.relative_to(root).as_posix() for key, run in zip(jobs, runs, strict=True) if run.path}


def _remove_copies(run: Run) -> None:
    """Delete the states of a run without adapters: copies of the model, which no verdict, table or figure reads."""
    if not run.ranks():
        remove_states(run)


def _measure_missing(out: str | Path) -> None:
    """Make the tables that are not there yet, side by side."""
    _, runs = _read_contents(out)
    left = [
        (PROBES[name].measure, run, file)
        for name, found in runs.items()
        for run in _measurable_runs(name, found)
        if not (file := _measured_file(out, name, run)).exists()
    ]
    Parallel(n_jobs=width())(delayed(_measure_one)(*job) for job in left)


def _measure_one(measure: Callable[[Run], pd.DataFrame], run: Run, file: Path) -> None:
    torch.set_num_threads(1)
    buffer = io.BytesIO()
    measure(run).to_parquet(buffer, index=False)
    write_bytes(file, buffer.getvalue())


def _measurable_runs(name: str, runs: Mapping[str, Sequence[Run]]) -> list[Run]:
    return [run for found in runs.values() for run in found] if PROBES[name].measure else []


def _measured_file(out: str | Path, name: str, run: Run) -> Path:
    return Path(out) / "measured" / f"{name}-{run.id}.parquet"


def _job(arm: Arm, seed: int, root: Path) -> Job:
    arm = arm.vary(arm, seed) if arm.vary else arm
    model = arm.model
    if isinstance(model, str) and arm.blocks is not None:
        model = partial(models.load, model, blocks=arm.blocks)
    return Job(model, arm.task, arm.method, {"seed": seed, **arm.settings, "root": root})
