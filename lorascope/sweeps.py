"""Many runs side by side: one process a run, one thread a process.

Two processes of one thread finish more steps than one of two. Runs that are finished are skipped, broken ones go on
where they were, and a worker that is killed costs the steps since its run's last checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend
from torch import nn
from tqdm.auto import tqdm

from lorascope.loop import train
from lorascope.method import Method
from lorascope.run import Run
from lorascope.tasks import Task

# A worker that dies this often without any run being finished meanwhile dies of the run itself.
ATTEMPTS = 3


@dataclass(frozen=True)
class Job:
    """One call of ``train``, to be made in a process of its own.

    Parameters
    ----------
    model : str or callable
        A name for ``models.load``, or something that makes a fresh model.
    data : Task, str or path
    method : Method
    settings : mapping
        Keywords of ``train``; ``steps`` among them.
    """

    model: str | Callable[[], nn.Module]
    data: Task | str | Path
    method: Method
    settings: Mapping[str, Any] = field(default_factory=dict)


def sweep(
    model: str | Callable[[], nn.Module],
    data: Task | str | Path,
    method: Method | Sequence[Method],
    *,
    seeds: int | Sequence[int] = 3,
    jobs: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[Run]:
    """Train one or several methods, each with several seeds.

    Parameters
    ----------
    model : str or callable
        A name for ``models.load``, or something that makes a fresh model (``functools.partial(ls.models.load, ...)``).
    data : Task, str or path
        As for ``train``.
    method : Method or sequence of Method
    seeds : int or sequence of int
        How many, counted from 0, or which.
    jobs : int, optional
        Processes at a time; the number of cores by default. A joblib backend set by ``joblib.parallel_config`` is used
        in place of local processes.
    progress : bool
        Show a bar over the runs.
    **settings
        Further keywords of ``train``; ``steps`` is needed, ``root`` says where the run folders lie.

    Returns
    -------
    list of Run
        Method by method, each with its seeds in order: what figures take.

    Raises
    ------
    RuntimeError
        Some runs failed; the others are kept, and the same call does only what is missing.
    """
    methods = [method] if isinstance(method, Method) else list(method)
    numbers = range(seeds) if isinstance(seeds, int) else seeds
    wanted = [Job(model, data, each, {**settings, "seed": seed}) for each in methods for seed in numbers]
    return run_jobs(wanted, jobs, progress)


def run_jobs(wanted: Sequence[Job], jobs: int | None = None, progress: bool = True) -> list[Run]:
    """Do all jobs, in any order, and give their runs in the order of the jobs; see ``sweep``."""
    folders: dict[int, Path] = {}
    failures: dict[int, str] = {}
    deaths = 0
    with tqdm(total=len(wanted), unit="run", disable=not progress) as bar:
        while left := [number for number in range(len(wanted)) if number not in folders and number not in failures]:
            workers = Parallel(n_jobs=jobs or width(), return_as="generator_unordered", batch_size=1)
            try:
                for number, folder, error in workers(delayed(_work)(number, wanted[number]) for number in left):
                    deaths = 0
                    if error:
                        failures[number] = error
                    else:
                        folders[number] = Path(folder)
                    bar.update()
            except TerminatedWorkerError as error:
                deaths += 1
                if deaths == ATTEMPTS:
                    names = "; ".join(_name(wanted[number]) for number in left)
                    raise RuntimeError(
                        f"a worker was killed {ATTEMPTS} times in a row, out of memory? Not finished: {names}"
                    ) from error
    if failures:
        lines = "; ".join(f"{_name(wanted[number])}: {error}" for number, error in sorted(failures.items()))
        raise RuntimeError(f"{len(failures)} of {len(wanted)} runs failed, the others are kept. {lines}")
    return [Run.read(folders[number]) for number in range(len(wanted))]


def _work(number: int, job: Job) -> tuple[int, str, str]:
    """Do one job in this process; gives its number, its folder, and what went wrong."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        model = job.model if isinstance(job.model, str) else job.model()
        run = train(model, job.data, job.method, **{**job.settings, "progress": False})
    except Exception as error:  # whatever a method or a model may raise: it must not end the other runs
        return number, "", f"{type(error).__name__}: {error}".partition("\n")[0]
    return number, str(run.path), ""


def width() -> int:
    """How many at a time: what ``joblib.parallel_config`` says, else one a core."""
    _, configured = get_active_backend()
    return configured or cpu_count()


def _name(job: Job) -> str:
    return f"{job.method.label()}, seed {job.settings.get('seed', 0)}"
