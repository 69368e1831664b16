"""Probes: one file a paper, each re-making its motivating observation and judging it.

``reproduce`` runs the probes asked for, side by side, and writes the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lorascope import models, report
from lorascope.probes import lisa, lora
from lorascope.probes.base import PROBES, Arm, Exhibit, Findings, Probe
from lorascope.sweeps import Job, run_jobs

__all__ = ["PROBES", "Arm", "Exhibit", "Findings", "Probe", "lisa", "lora", "reproduce"]

QUICK_SEEDS, FULL_SEEDS = 2, 3


def reproduce(names: Sequence[str], quick: bool, seeds: int | None, out: str | Path) -> Path:
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
    Path
        Of ``report.html``.

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
    of_probe = {
        name: {arm.label: [runs[arm.label, seed] for seed in range(count)] for arm in found}
        for name, found in arms.items()
    }
    findings = {name: probe.judge(of_probe[name]) for name, probe in chosen.items()}
    return report.write(Path(out) / "report.html", findings, of_probe, quick=quick)


def _train(arms: Sequence[Arm], seeds: Sequence[int], root: Path) -> dict[tuple[str, int], Run]:
    """Runs by label of the arm and seed; an arm that two probes share is trained once.

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
    return dict(zip(jobs, run_jobs(list(jobs.values())), strict=True))


def _job(arm: Arm, seed: int, root: Path) -> Job:
    model = arm.model if arm.blocks is None else partial(models.load, arm.model, blocks=arm.blocks)
    return Job(model, arm.task, arm.method, {**arm.settings, "seed": seed, "root": root})
