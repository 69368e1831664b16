"""Probes: one file a paper, each re-making its motivating observation and judging it.

``reproduce`` runs the probes asked for, side by side, and writes the report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorascope import models, report
from lorascope.claims import Verdict
from lorascope.probe import PROBES, Arm, Exhibit, Findings, Probe
from lorascope.probes import lisa, lora
from lorascope.run import Run
from lorascope.sweeps import Job, run_jobs
from lorascope.tensors import write_json

__all__ = ["PROBES", "Arm", "Exhibit", "Findings", "Outcome", "Probe", "lisa", "lora", "reproduce", "write_report"]

QUICK_SEEDS, FULL_SEEDS = 2, 3
# Which runs in a folder belong to which arm of which probe.
CONTENTS = "probes.json"


@dataclass(frozen=True)
class Outcome:
    """What ``reproduce`` found: the verdicts of each probe, and where the report lies."""

    path: Path
    verdicts: Mapping[str, Sequence[Verdict]]

    def plain(self) -> dict[str, Any]:
        """For a program."""
        listed: list[dict[str, Any]] = [
            {"probe": name, "claim": verdict.claim.sentence, "outcome": verdict.outcome, "margin": verdict.claim.margin}
            | {"effect": verdict.effect, "low": _number(verdict.low), "high": _number(verdict.high), "n": verdict.n}
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
        return "\n".join([*lines, "", f"report: {self.path}"])


def _number(value: float) -> float | None:
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
        Seeds of each arm; 2 if quick, else 3, by default.
    out : path
        Runs lie in ``out/runs``; runs that are there already are not trained again.

    Returns
    -------
    Outcome
        The verdicts, and where the report lies.

    Raises
    ------
    ValueError
        An unknown probe.
    """
    unknown = [name for name in names if name not in PROBES]
    if unknown:
        raise ValueError(f"unknown probe {unknown[0]!r}; there are {', '.join(PROBES)}")
    chosen = {name: PROBES[name] for name in names or PROBES}
    count = seeds or (QUICK_SEEDS if quick else FULL_SEEDS)
    arms = {name: probe.arms(quick) for name, probe in chosen.items()}
    runs = _train([arm for found in arms.values() for arm in found], range(count), Path(out) / "runs")
    folders = {
        name: {arm.label: [runs[arm.label, seed] for seed in range(count)] for arm in found}
        for name, found in arms.items()
    }
    write_json(Path(out) / CONTENTS, {"quick": quick, "probes": folders})
    return write_report(out)


def write_report(out: str | Path) -> Outcome:
    """Judge the runs of an earlier ``reproduce`` and write their report, training nothing.

    Raises
    ------
    FileNotFoundError
        The folder is none that ``reproduce`` filled, or lacks a run.
    """
    file = Path(out) / CONTENTS
    if not file.exists():
        raise FileNotFoundError(f"{out} was not filled by reproduce: it has no {CONTENTS}")
    contents = json.loads(file.read_text())
    runs = {
        name: {label: [Run.read(Path(out) / "runs" / folder) for folder in found] for label, found in labels.items()}
        for name, labels in contents["probes"].items()
    }
    findings = {name: PROBES[name].judge(found) for name, found in runs.items()}
    path = report.write(Path(out) / "report.html", findings, runs, quick=contents["quick"])
    return Outcome(path, {name: found.verdicts for name, found in findings.items()})


def _train(arms: Sequence[Arm], seeds: Sequence[int], root: Path) -> dict[tuple[str, int], str]:
    """Names of the run folders by label of the arm and seed; an arm that two probes share is trained once.

    Raises
    ------
    ValueError
        Two arms have one label, but are not the same.
    """
    by_label: dict[str, Arm] = {}
    for arm in arms:
        if by_label.setdefault(arm.label, arm) != arm:
            raise ValueError(f"two probes mean different arms by {arm.label!r}: give them different labels")
    jobs = {(label, seed): _job(arm, seed, root) for label, arm in by_label.items() for seed in seeds}
    runs = run_jobs(list(jobs.values()))
    return {key: run.path.name for key, run in zip(jobs, runs, strict=True) if run.path}


def _job(arm: Arm, seed: int, root: Path) -> Job:
    model = arm.model if arm.blocks is None else partial(models.load, arm.model, blocks=arm.blocks)
    return Job(model, arm.task, arm.method, {**arm.settings, "seed": seed, "root": root})
