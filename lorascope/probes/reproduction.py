"""Reproduction of the papers' observations: train the runs of the probes, judge their claims, write the report."""

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
from lorascope.schema.deprecation import old_attribute
from lorascope.schema.suggestions import unknown_name

QUICK_SEEDS = 2
CONTENTS = "probes.json"
"""File that maps probes and arms to run folders."""
REPORT = "report.html"


@dataclass(frozen=True)
class _Contents:
    """Contents of ``probes.json``: names of run folders by probe and label of the arm."""

    quick: bool
    probes: dict[str, dict[str, list[str]]]


@dataclass(frozen=True)
class Outcome:
    """Result of ``reproduce``: the path of the report and the verdicts of each probe."""

    path: Path
    verdicts: Mapping[str, Sequence[Verdict]]

    def to_dict(self) -> dict[str, Any]:
        """Return the report path and the verdicts as JSON values; the bounds are None for a single seed."""
        listed: list[dict[str, Any]] = [
            {"probe": name, "claim": verdict.claim.sentence, "outcome": verdict.outcome, "margin": verdict.claim.margin}
            | {"effect": verdict.effect}
            # JSON cannot represent NaN.
            | {end: None if math.isnan(at) else at for end, at in (("low", verdict.low), ("high", verdict.high))}
            | {"n": verdict.n}
            for name, verdicts in self.verdicts.items()
            for verdict in verdicts
        ]
        return {"report": str(self.path), "claims": listed}

    plain = old_attribute("plain", "to_dict")

    def __str__(self) -> str:
        lines = [
            f"{name}: {verdict.claim.sentence}\n    {verdict}"
            for name, verdicts in self.verdicts.items()
            for verdict in verdicts
        ]
        return "\n".join([*lines, "", f"report: {printable(self.path)}"])


def reproduce(names: Sequence[str], quick: bool, seeds: int | None, out: str | Path) -> Outcome:
    """Train the runs of the probes, judge their claims, and write the report.

    Parameters
    ----------
    names : sequence of str
        Names of the probes; all probes if empty.
    quick : bool
        Use few steps and seeds. A quick run tests the pipeline and decides no claim.
    seeds : int or None
        Number of seeds per arm. None takes 2 if quick, else the number that each probe defines.
    out : path
        Output folder. Runs are stored in ``out/runs``, and finished runs in it are reused. The saved parameters of runs
        without adapters are removed, because each is a copy of the model.

    Returns
    -------
    Outcome
        The path of the report and the verdicts.

    Raises
    ------
    FileExistsError
        ``out`` has a ``report.html`` that lorascope did not write.
    ValueError
        A probe is unknown, or ``out`` has a ``probes.json`` that lorascope did not write.
    """
    for name in names:
        if name not in PROBES:
            raise ValueError(unknown_name("probe", name, PROBES))
    chosen = {name: PROBES[name] for name in names or PROBES}
    page.require_report(Path(out) / REPORT)
    # Reading an existing file raises an error here if another program wrote it, before it is replaced.
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
    left = [
        (PROBES[name].measure, run, file)
        for name, labelled in _read_contents(out)[1].items()
        for run, file in _measured_files(out, name, labelled)
        if not file.exists()
    ]
    Parallel(n_jobs=width())(delayed(_measure_one)(*job) for job in left)
    return write_report(out)


def write_report(out: str | Path) -> Outcome:
    """Judge the runs of an earlier ``reproduce`` again and write their report, without training.

    Parameters
    ----------
    out : path
        Folder that ``reproduce`` wrote.

    Returns
    -------
    Outcome
        The path of the report and the verdicts.

    Raises
    ------
    FileExistsError
        ``out`` has a ``report.html`` that lorascope did not write.
    FileNotFoundError
        The folder has no ``probes.json``, or a run is missing.
    ValueError
        ``probes.json`` is invalid, or an arm or a measured value is missing.
    """
    quick, runs = _read_contents(out)
    found = _judge(out, runs)
    path = page.write(Path(out) / REPORT, found, runs, quick=quick)
    return Outcome(path, {name: each.verdicts for name, each in found.items()})


def findings(out: str | Path) -> dict[str, Findings]:
    """Return the findings of each probe, with charts, for the runs of an earlier ``reproduce``.

    Parameters
    ----------
    out : path
        Folder that ``reproduce`` wrote.

    Returns
    -------
    dict
        Name of a probe -> findings.

    Raises
    ------
    FileNotFoundError, ValueError
        See ``write_report``.
    """
    return _judge(out, _read_contents(out)[1])


def _judge(out: str | Path, runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> dict[str, Findings]:
    found = {}
    for name, labelled in runs.items():
        tables = {run.id: read_table(file, file) for run, file in _measured_files(out, name, labelled)}
        try:
            found[name] = PROBES[name].judge(labelled, tables or None)
        except KeyError as error:  # an arm or a score that an earlier version did not have
            raise ValueError(
                f"cannot judge probe {name!r}: {printable(error)} is missing in its runs or in its tables in "
                f"{printable(Path(out) / 'measured')}"
            ) from error
    return found


def _read_contents(out: str | Path) -> tuple[bool, dict[str, dict[str, list[Run]]]]:
    """Return whether the settings were the quick ones, and the runs of each probe by arm."""
    file = Path(out) / CONTENTS
    if not file.exists():
        raise FileNotFoundError(
            f"cannot report on {printable(out)}: it has no {CONTENTS}. Run reproduce on this folder first"
        )
    contents = read_json(file, _Contents)
    if unknown := sorted(contents.probes.keys() - PROBES.keys()):
        raise ValueError(f"cannot read {printable(file)}: unknown probe {printable(unknown[0])!r}")
    # The names come from a file, and none of them may lead outside the folder of runs.
    root = Path(out) / "runs"
    for folder in (each for labels in contents.probes.values() for found in labels.values() for each in found):
        if not all(map(is_plain, folder.split("/"))):
            raise ValueError(
                f"cannot read {printable(file)}: a run must be in {printable(root)}, got {printable(folder)!r}"
            )
    return contents.quick, {
        name: {
            # A folder is ``recipe/phase`` for the last phase of a recipe.
            PROBES[name].former_labels.get(label, label): [Run.read(root / folder) for folder in found]
            for label, found in labels.items()
        }
        for name, labels in contents.probes.items()
    }


def _train_arms(wanted: Sequence[tuple[Arm, int]], root: Path) -> dict[tuple[str, int], str]:
    """Train the arms and return the names of their run folders by label and seed.

    An arm that two probes share is trained once.

    Raises
    ------
    ValueError
        Two different arms have the same label.
    """
    by_label: dict[str, Arm] = {}
    for arm, _ in wanted:
        if by_label.setdefault(arm.label, arm) != arm:
            raise ValueError(f"labels must be unique, got two different arms with label {arm.label!r}")
    jobs = {}
    for arm, seed in wanted:
        varied = arm.vary(arm, seed) if arm.vary else arm
        model = varied.model
        if isinstance(model, str) and varied.blocks is not None:
            model = partial(models.load, model, blocks=varied.blocks)
        # The settings come after the seed, because ``vary`` may set a different seed in them.
        settings = {"seed": seed, **varied.settings, "root": root}
        jobs[arm.label, seed] = Job(model, varied.task, varied.method, settings)
    runs = run_jobs(list(jobs.values()), ended=_remove_copies).all_runs()
    # The path is relative to the root because a recipe of several phases returns its last phase, a subfolder.
    return {key: run.path.relative_to(root).as_posix() for key, run in zip(jobs, runs, strict=True) if run.path}


def _remove_copies(run: Run) -> None:
    """Delete the saved parameters of a run without adapters; no verdict, table or figure reads these copies."""
    if not run.ranks():
        remove_states(run)


def _measure_one(measure: Callable[[Run], pd.DataFrame], run: Run, file: Path) -> None:
    torch.set_num_threads(1)  # because measurements run in parallel processes
    buffer = io.BytesIO()
    measure(run).to_parquet(buffer, index=False)
    write_bytes(file, buffer.getvalue())


def _measured_files(out: str | Path, name: str, labelled: Mapping[str, Sequence[Run]]) -> list[tuple[Run, Path]]:
    """Return the runs that the probe measures, each with the file of its table."""
    runs = [run for found in labelled.values() for run in found] if PROBES[name].measure else []
    return [(run, Path(out) / "measured" / f"{name}-{run.id}.parquet") for run in runs]
