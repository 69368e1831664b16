"""Retraining of a run at other ranks, with the same seeds, at the same and at three times its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm.auto import tqdm

from lorascope.analysis.rank_prices import RUNS
from lorascope.inputs.tasks import Task
from lorascope.methods.method import from_config
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.training.loop import train
from lorascope.training.settings import Settings

FACTORS = (1.0, 3.0)
"""Learning rates relative to that of the run, because the best one depends on the rank."""


class RetrainedSpec(NamedTuple):
    """Rank of a run to train, whether its components are placed by size instead, learning rate and seed."""

    rank: int
    placed: int
    lr: float
    seed: int


def list_retrainings(run: Run, ranks: Sequence[int], seeds: int, placed: bool) -> list[RetrainedSpec]:
    """Return the runs that the prices of some ranks need, those of the present rank first; the run itself is there.

    Smaller ranks are placed as well if asked for.
    """
    rank, lr, first = run.meta.recipe["rank"], run.meta.settings["lr"], run.meta.seed or 0
    specs = []
    for seed in range(first, first + seeds):
        specs.append(RetrainedSpec(rank, 0, lr, seed))
        # Every rank is paired with the present one at the same seed.
        for other in ranks:
            for factor in FACTORS:
                specs.append(RetrainedSpec(other, 0, lr * factor, seed))
                if placed and other < rank:
                    specs.append(RetrainedSpec(other, 1, lr * factor, seed))
    return list(dict.fromkeys(specs))


def describe_cost(run: Run, ranks: Sequence[int], seeds: int, placed: bool = False) -> str:
    """Return how many runs the prices of some ranks need, and how long they take if they are as fast as the run."""
    count = len(list_retrainings(run, ranks, seeds, placed)) - 1  # the run itself is trained
    minutes = count * run.meta.seconds / 60
    return f"{count} runs, about {minutes:.0f} minutes" if minutes >= 1 else f"{count} runs, less than a minute"


def missing_for_retraining(run: Result, task: Task | None = None) -> str:
    """Return why a run cannot be trained again at another rank, or an empty string."""
    if not isinstance(run, Run) or run.meta.w0_hash is None:
        return f"{run.reference} was not trained by ls.train"
    if run.meta.parents:
        return f"{run.reference} is the last of several phases"
    if not isinstance(run.meta.recipe.get("rank"), int):
        return f"{run.meta.recipe['name']} of {run.reference} has no single rank"
    if task is not None and task.hash != run.meta.data_hash:
        return f"the rows of {task.name} are not those of {run.meta.task}, on which {run.reference} was trained"
    return ""


def train_ranks(
    run: Run,
    model: str | Path,
    task: Task,
    specs: Sequence[RetrainedSpec],
    placements: Mapping[int, Mapping[str, int]],
    bar: tqdm,
) -> dict[RetrainedSpec, Run]:
    """Train the runs in a folder next to that of the run, or open those that are finished.

    ``placements`` are the ranks of the modules by the uniform rank of as many components.

    Alpha stays the same, so that the scale alpha / rank is larger at a smaller rank, as in ``export.rank_pattern``.
    """
    # Observers are not among the settings, because only losses are compared.
    settings = asdict(Settings.read(run.meta.settings))
    method: Any = from_config(run.meta.recipe)
    # Not in the folder of the run, whose files are its own.
    assert run.path is not None
    root = run.path.parent / f"{run.path.name}-retrained"
    runs = {}
    for spec in specs:
        bar.set_postfix_str(f"rank {spec.rank}, lr {spec.lr:g}, seed {spec.seed}")
        # The same training gives the same weights, bit by bit.
        if spec == RetrainedSpec(run.meta.recipe["rank"], 0, settings["lr"], run.meta.seed or 0):
            runs[spec] = run
        else:
            rank = placements[spec.rank] if spec.placed else spec.rank
            changed = {"lr": spec.lr, "seed": spec.seed, "root": root, "observe": (), "progress": False}
            runs[spec] = train(str(model), task, replace(method, rank=rank), **settings | changed)
        bar.update()
    return runs


def tabulate_runs(runs: dict[RetrainedSpec, Run], run: Run, loss: Callable[[Run], float]) -> pd.DataFrame:
    """Return the table of retrained runs, with the change of their loss from the present rank, paired by seed."""
    rank, lr = run.meta.recipe["rank"], run.meta.settings["lr"]
    losses = {spec: loss(retrained) for spec, retrained in runs.items()}
    records = []
    for spec, value in losses.items():
        reference = losses[RetrainedSpec(rank, 0, lr, spec.seed)]
        records.append((*spec, value, value - reference))
    return pd.DataFrame(records, columns=RUNS).sort_values(RUNS[:4], ignore_index=True)
