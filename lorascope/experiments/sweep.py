"""Many runs side by side: one process a run, one thread a process.

Two processes of one thread finish more steps than one of two. Runs that are finished are skipped, broken ones go on
where they were, and a worker that is killed costs the steps since its run's last checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from joblib import Parallel, cpu_count, delayed
from joblib.parallel import get_active_backend

from lorascope.analysis.recipe_comparison import recipes
from lorascope.experiments import grid
from lorascope.experiments.executors import is_death, use_backend
from lorascope.experiments.grid import Data, Grid, Job, Model
from lorascope.experiments.sweep_table import SweepTable
from lorascope.methods.base import Method
from lorascope.runs.folders import RunLocked
from lorascope.runs.run import Run
from lorascope.schema.labels import to_words
from lorascope.training.loop import train
from lorascope.training.output_folder import StateRemoved
from lorascope.training.progress import ProgressFile, read_progress, writing_progress

__all__ = ["ATTEMPTS", "Job", "SweepResult", "run_grid", "run_jobs", "sweep", "width"]

# A run whose worker is killed this often is given up.
ATTEMPTS = 3
# Generators and the number of threads belong to the process: a worker with several threads trains one run at a time.
_ONE_AT_A_TIME = threading.Lock()
# Seconds between two tries to train what another process is training.
_PAUSE = 1.0


class RunsFailed(RuntimeError):
    """Some runs of a sweep failed; the message has a line for each."""


@dataclass(frozen=True)
class SweepResult:
    """What came of the jobs of a sweep.

    Parameters
    ----------
    wanted : sequence of Job
    folders : mapping number of the job -> run folder
        Of the finished runs.
    failures : mapping number of the job -> reason
    """

    wanted: Sequence[Job]
    folders: dict[int, Path] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def remaining_jobs(self) -> list[int]:
        """Numbers of the jobs that are neither done nor failed."""
        return [number for number in range(len(self.wanted)) if number not in {*self.folders, *self.failures}]

    @property
    def names(self) -> list[str]:
        """The jobs in words: the method, and what else tells them apart."""
        return _job_names(self.wanted)

    def runs(self) -> list[Run]:
        """The finished runs, in the order of the jobs."""
        return [Run.read(self.folders[number]) for number in sorted(self.folders)]

    def complaints(self) -> list[str]:
        """A line for each failed run."""
        names = self.names
        return [f"{names[number]}: {reason}" for number, reason in sorted(self.failures.items())]


@overload
def sweep(
    model: Model,
    data: Data,
    method: Method | Sequence[Method],
    *,
    seeds: int | Sequence[int] = 3,
    jobs: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[Run]: ...


@overload
def sweep(model: Mapping[str, Any] | str | Path, *, jobs: int | None = None, progress: bool = True) -> list[Run]: ...


def sweep(
    model: Any,
    data: Data | None = None,
    method: Method | Sequence[Method] | None = None,
    *,
    seeds: int | Sequence[int] = 3,
    jobs: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[Run]:
    """Train one or several methods, each with several seeds; or every combination of a grid.

    Parameters
    ----------
    model : str or callable; or mapping or path
        A name for ``models.load``, or something that makes a fresh model (``functools.partial(ls.models.load, ...)``).
        Alone, a grid: what ``lorascope sweep`` takes as a TOML file, or the path of such a file.
    data : Task, str or path
        As for ``train``.
    method : Method or sequence of Method
    seeds : int or sequence of int
        How many, counted from 0, or which.
    jobs : int, optional
        Processes at a time; the number of cores by default. A joblib backend set by ``joblib.parallel_config`` is used
        in place of local processes.
    progress : bool
        Show a table of the runs; a line whenever one begins or ends where there is no terminal.
    **settings
        Further keywords of ``train``; ``steps`` is needed, ``root`` says where the run folders lie.

    Returns
    -------
    list of Run
        Method by method, each with its seeds in order: what figures take.

    Raises
    ------
    RunsFailed
        Some runs failed; the others are kept, and the same call does only what is missing.
    ValueError
        Something in the grid is wrong; nothing was trained.
    """
    if data is None or method is None:
        if data is not None or settings:
            raise ValueError("a sweep takes a model, data and methods; or a grid alone, which holds all of them")
        found = grid.read(model)
        return _all_runs(run_grid(found, jobs, progress))
    methods = [method] if isinstance(method, Method) else list(method)
    numbers = range(seeds) if isinstance(seeds, int) else seeds
    return run_jobs(Grid([model], [data], methods, [settings], numbers).jobs(), jobs, progress)


def run_grid(found: Grid, jobs: int | None = None, progress: bool = True) -> SweepResult:
    """Do all that is in a grid, on its backend."""
    with use_backend(**found.backend):
        return attempt(found.jobs(), jobs, progress)


def run_jobs(
    wanted: Sequence[Job],
    jobs: int | None = None,
    progress: bool = True,
    ended: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Do all jobs, in any order, and return their runs in the order of the jobs; see ``sweep``.

    ``ended`` is called in this process with each run once it is finished.
    """
    return _all_runs(attempt(wanted, jobs, progress, ended))


def _all_runs(swept: SweepResult) -> list[Run]:
    if swept.failures:
        lines = "; ".join(swept.complaints())
        raise RunsFailed(f"{len(swept.failures)} of {len(swept.wanted)} runs failed, the others are kept. {lines}")
    return swept.runs()


def attempt(
    wanted: Sequence[Job], jobs: int | None, progress: bool, ended: Callable[[Run], None] = lambda run: None
) -> SweepResult:
    """Do all jobs; one that fails, or whose worker is killed again and again, leaves the others alone."""
    swept = SweepResult(wanted)
    root = Path(wanted[0].settings.get("root", "runs")) if wanted else Path()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sweep-", dir=root, ignore_cleanup_errors=True) as notes:

        def note(number: int) -> Path:
            return Path(notes).resolve() / f"{number}.json"

        with SweepTable(swept.names, note, sys.stderr if progress else None) as board:
            unborn = 0
            while left := swept.remaining_jobs:
                begun = {number: read_progress(note(number)).get("begun", 0) for number in left}
                if spent := [number for number in left if begun[number] >= ATTEMPTS]:
                    for number in spent:
                        _finish_job(swept, board, number, "", _killed_message())
                    continue
                # Who was there at two deaths may be their cause, and goes on alone.
                batch = [number for number in left if begun[number] < ATTEMPTS - 1] or left[:1]
                calls = [delayed(_do_job)(number, wanted[number], Path.cwd(), note(number)) for number in batch]
                # All at once: a cluster may grow while it works, and has a queue of its own.
                options = {"return_as": "generator_unordered", "batch_size": 1, "pre_dispatch": "all"}
                workers = Parallel(n_jobs=jobs or width(), **options)
                try:
                    for number, folder, error in workers(calls):
                        _finish_job(swept, board, number, folder, error)
                        if not error:
                            ended(Run.read(folder))
                except Exception as error:
                    if not is_death(error):
                        raise
                    # A worker that dies before it begins dies of what is around it.
                    still = all(read_progress(note(number)).get("begun", 0) == begun[number] for number in left)
                    unborn = unborn + 1 if still else 0
                    if unborn == ATTEMPTS:
                        for number in left:
                            _finish_job(swept, board, number, "", f"{ATTEMPTS} workers were killed before it began")
    return swept


def _finish_job(swept: SweepResult, board: SweepTable, number: int, folder: str, error: str) -> None:
    if error:
        swept.failures[number] = error
        board.end(number, "failed", error)
        return
    swept.folders[number] = Path(folder)
    test = Run.read(folder).meta["test"]
    board.end(number, "done", f"{test['name']} {test['metric']:.4g}")


def _killed_message() -> str:
    return f"its worker was killed {ATTEMPTS} times, out of memory?"


def _do_job(number: int, job: Job, here: Path, file: Path) -> tuple[int, str, str]:
    """Do one job in this process; gives its number, its folder, and what went wrong."""
    with _ONE_AT_A_TIME:
        try:
            if read_progress(file).get("begun", 0) >= ATTEMPTS:
                return number, "", _killed_message()  # a cluster has begun it again by itself
            os.chdir(here)  # what is named relatively lies where the sweep was called
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                with writing_progress(ProgressFile(file)):
                    run = _train_job(job)
            finally:
                torch.set_num_threads(threads)
        except Exception as error:  # whatever a method or a model may raise: it must not end the other runs
            return number, "", f"{type(error).__name__}: {error}".partition("\n")[0]
        return number, str(run.path), ""


def _train_job(job: Job) -> Run:
    while True:
        model = job.model if isinstance(job.model, str) else job.model()
        try:
            return train(model, job.data, job.method, **{**job.settings, "progress": False})
        except StateRemoved as found:
            return found.run  # a sweep needs the run, not the model
        except RunLocked:
            time.sleep(_PAUSE)  # a worker that was given up may still be at it


def width() -> int:
    """How many at a time: what ``joblib.parallel_config`` says, else one a core."""
    _, configured = get_active_backend()
    return configured or cpu_count()


def _job_names(wanted: Sequence[Job]) -> list[str]:
    labels = [job.method.label() for job in wanted]
    settings = [{"lr": job.method.lr, "head_lr": job.method.head_lr} | dict(job.settings) for job in wanted]
    told = recipes(
        labels, [{key: _setting_phrase(v) for key, v in s.items() if key not in ("seed", "root")} for s in settings]
    )
    parts = [told, *(_place_phrase(places) for places in ([j.model for j in wanted], [j.data for j in wanted]))]
    seeds = [f"seed {job.settings.get('seed', 0)}" for job in wanted]
    return [", ".join(filter(None, each)) for each in zip(*parts, seeds, strict=True)]


def _setting_phrase(value: Any) -> Any:
    """A setting as a name shows it: observers by what they were told."""
    if not isinstance(value, list | tuple):
        return value
    told = []
    for observer in value:
        given = [(f, getattr(observer, f.name)) for f in dataclasses.fields(observer) if f.init]
        own = [f"{f.name} {each}" for f, each in given if isinstance(each, int | float | str) and each != f.default]
        told.append(" ".join([type(observer).__name__, *own]))
    return " + ".join(told) or "nothing"


def _place_phrase(places: Sequence[Any]) -> list[str]:
    """Models or tasks by name, if there are several."""
    names = [to_words(getattr(place, "name", place)) for place in places]
    return names if len(set(names)) > 1 else [""] * len(names)
