"""Sweeps: many runs in parallel, with one process per run and one thread per process.

Two processes with one thread each finish more steps than one process with two threads. Finished runs are skipped and
interrupted ones resume. A killed worker loses only the steps since the last checkpoint of its run.
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
from typing import Any

import torch
from joblib import Parallel, cpu_count, delayed
from joblib.parallel import get_active_backend

from lorascope.analysis.recipe_tests import name_recipes
from lorascope.experiments import grid, recipe
from lorascope.experiments.executors import (
    accept_interrupts,
    ignore_replaced_workers,
    is_death,
    start_workers_quietly,
    use_backend,
)
from lorascope.experiments.grid import Data, Grid, Job
from lorascope.experiments.sweep_table import SweepTable
from lorascope.inputs.metrics import resolve
from lorascope.methods.method import Method
from lorascope.runs.folders import RunLocked
from lorascope.runs.run import Run
from lorascope.schema.labels import to_words
from lorascope.schema.records import QUANTITIES, Quantity, adopt
from lorascope.training.loop import train
from lorascope.training.output_folder import StateRemoved
from lorascope.training.processes import require_single
from lorascope.training.progress import ProgressFile, read_progress, writing_progress

# A run fails after its worker was killed this many times.
ATTEMPTS = 3
_KILLED = "its worker was killed {} times, out of memory?"
# Random generators and the number of threads are global: a worker with several threads trains one run at a time.
_ONE_AT_A_TIME = threading.Lock()
# Seconds between attempts to train a run that another process is training.
_PAUSE = 1.0


class RunsFailed(RuntimeError):
    """Error of a sweep with failed runs; the message names each of them and the reason."""


@dataclass(frozen=True)
class SweepResult:
    """Results of a sweep: for the number of each job, the folder of its finished run or the reason of its failure.

    ``broken`` are folders of failed runs that ended early, such as diverged ones.
    """

    jobs: Sequence[Job]
    folders: dict[int, Path] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    broken: dict[int, Path] = field(default_factory=dict)

    @property
    def remaining_jobs(self) -> list[int]:
        """Numbers of the jobs that are neither done nor failed."""
        return sorted(set(range(len(self.jobs))).difference(self.folders, self.failures))

    @property
    def names(self) -> list[str]:
        """Names of the jobs: their own, else method, seed, and the settings, models and tasks in which they differ."""
        methods = [job.method.label() for job in self.jobs]
        columns = [name_recipes(methods, list(map(_named_settings, self.jobs)))]
        for attribute in ("model", "data"):
            sources = [_source_name(getattr(job, attribute)) for job in self.jobs]
            if len(set(sources)) > 1:
                columns.append(sources)
        names = []
        for job, *cells in zip(self.jobs, *columns, strict=True):
            seed = f"seed {job.settings.get('seed', 0)}"
            names.append(job.name or ", ".join(filter(None, [*cells, seed])))
        return names

    @property
    def finished_names(self) -> list[str]:
        """Names of the jobs whose runs are finished, in the order of :meth:`runs`."""
        names = self.names
        return [names[number] for number in sorted(self.folders)]

    def runs(self) -> list[Run]:
        """Return the finished runs, in the order of the jobs."""
        return [Run.read(self.folders[number]) for number in sorted(self.folders)]

    def broken_runs(self) -> list[Run]:
        """Return the runs that ended early, such as diverged ones, in the order of the jobs."""
        return [Run.read(self.broken[number]) for number in sorted(self.broken)]

    def all_runs(self) -> list[Run]:
        """Return the runs of all jobs; raise RunsFailed if one failed."""
        if self.failures:
            lines = "; ".join(self.complaints())
            raise RunsFailed(f"{len(self.failures)} of {len(self.jobs)} runs failed; the others are saved. {lines}")
        return self.runs()

    def complaints(self) -> list[str]:
        """Return one line per failed run."""
        names = self.names
        return [f"{names[number]}: {reason}" for number, reason in sorted(self.failures.items())]


def sweep(
    model: Any,
    data: Data | None = None,
    method: Method | Sequence[Method] | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    jobs: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[Run]:
    """Train a sweep: one or several methods with several seeds each, or every combination of a grid.

    Parameters
    ----------
    model : str or callable; or mapping or path
        Name for ``models.load``, or a function that returns a fresh model
        (``functools.partial(ls.models.load, ...)``). As the only argument, a grid: the TOML file of
        ``lorascope sweep``, a mapping with its content, or the name of a recipe, such as "adalora-table1".
    data : Task, str or path
        See ``train``.
    method : Method or sequence of Method
        Methods to train.
    seeds : int or sequence of int
        Number of seeds, counted from 0, or the seeds themselves. Default 3, or those of the grid.
    jobs : int, optional
        Number of parallel processes, default the number of cores. A joblib backend set by
        ``joblib.parallel_config`` replaces local processes.
    progress : bool
        Show a table of the runs, or, without a terminal, a line whenever a run starts or ends. Default True.
    **settings
        Further keyword arguments of ``train``. ``steps`` is required; ``root`` is the folder of the runs.

    Returns
    -------
    list of Run
        The runs of each method in turn, ordered by seed, as figures expect them.

    Raises
    ------
    RunsFailed
        Some runs failed. The others are saved, and the same call trains only the missing ones.
    ValueError
        The grid is invalid; nothing was trained.
    """
    if data is None or method is None:
        if data is not None or seeds is not None or settings:
            raise ValueError("a sweep requires model, data and method, or only a grid, which contains them and seeds")
        if isinstance(model, str | Path):
            path = recipe.find_recipe(model)
            # Its grids have one model and task each, so they run together.
            if recipe.is_recipe(grid.read_toml(path)):
                plan = recipe.read(path)
                with use_backend(**plan.backend):
                    return run_jobs(plan.jobs(), jobs, progress).all_runs()
            model = path
        return run_grid(grid.read(model), jobs, progress).all_runs()
    if isinstance(method, Method):
        method = [method]
    methods = list(method)
    if not methods:
        raise ValueError("method must be a method or a list of methods, got none")
    numbers = grid.parse_seeds(3 if seeds is None else seeds)
    return run_jobs(Grid([model], [data], methods, [settings], numbers).jobs(), jobs, progress).all_runs()


def run_grid(job_grid: Grid, jobs: int | None = None, progress: bool = True) -> SweepResult:
    """Run a sweep over a grid: all its jobs, on its backend."""
    with use_backend(**job_grid.backend):
        return run_jobs(job_grid.jobs(), jobs, progress)


def run_jobs(
    jobs: Sequence[Job],
    workers: int | None = None,
    progress: bool = True,
    ended: Callable[[Run], None] = lambda run: None,
) -> SweepResult:
    """Run all jobs of a sweep; one that fails, or whose worker is killed repeatedly, does not affect the others.

    Jobs with a start run after all that are ready without one, and fail if it failed.
    ``ended`` is called in this process with each run when it finishes.
    """
    require_single("train a sweep")
    swept = SweepResult(jobs)
    if not jobs:
        return swept
    numbers = dict(zip(swept.names, range(len(jobs)), strict=True))
    starts = {number: numbers[job.start] for number, job in enumerate(jobs) if job.start}
    root = Path(jobs[0].settings.get("root", "runs"))
    root.mkdir(parents=True, exist_ok=True)
    # Progress files are next to the runs, in a folder that all machines of a cluster have.
    with tempfile.TemporaryDirectory(prefix=".sweep-", dir=root, ignore_cleanup_errors=True) as notes:
        files = [Path(notes).resolve() / f"{number}.json" for number in range(len(jobs))]
        table = SweepTable(swept.names, files.__getitem__, sys.stderr if progress else None)
        with table as board, ignore_replaced_workers():

            def fail(number: int, reason: str) -> None:
                swept.failures[number] = reason
                board.end(number, "failed", reason)

            unborn = 0
            while waiting := swept.remaining_jobs:
                left, orphans = _divide_by_start(waiting, starts, swept)
                for number in orphans:
                    fail(number, f"its start failed: {swept.names[starts[number]]}")
                if not left:
                    continue
                begun = {number: _begun(files[number]) for number in left}
                if max(begun.values()) >= ATTEMPTS:
                    for number in left:
                        if begun[number] >= ATTEMPTS:
                            fail(number, _KILLED.format(ATTEMPTS))
                    continue
                # A job that ran during two worker deaths may be their cause: such jobs run last, one at a time.
                batch = [number for number in left if begun[number] < ATTEMPTS - 1] or left[:1]
                start = delayed(_do_job)
                calls = []
                for number in batch:
                    job = jobs[number]
                    if number in starts:
                        source = str(swept.folders[starts[number]].resolve())
                        job = dataclasses.replace(job, settings={**job.settings, "start": source})
                    calls.append(start(number, job, Path.cwd(), files[number], QUANTITIES))
                # Dispatch all jobs at once: a cluster may grow during the sweep, and it has its own queue.
                options = {"return_as": "generator_unordered", "batch_size": 1, "pre_dispatch": "all"}
                pool = Parallel(n_jobs=workers or width(), **options)
                try:
                    with start_workers_quietly():
                        results = pool(calls)
                    for number, folder, error in results:
                        if error:
                            fail(number, error)
                            if folder:
                                swept.broken[number] = Path(folder)
                            continue
                        swept.folders[number] = Path(folder)
                        run = Run.read(folder)
                        board.end(number, "done", f"{run.score.name} {run.score.metric:.4g}")
                        ended(run)
                except KeyboardInterrupt:
                    count = f"{len(swept.folders)} of {len(jobs)} runs are finished"
                    raise KeyboardInterrupt(f"interrupted; {count}, repeat the same call to resume") from None
                except Exception as error:
                    if not is_death(error):
                        raise
                    # If no job started, the environment killed the worker, not a job.
                    unborn += 1
                    if any(_begun(files[number]) != begun[number] for number in left):
                        unborn = 0
                    if unborn == ATTEMPTS:
                        for number in left:
                            fail(number, f"{ATTEMPTS} workers were killed before it started")
    return swept


def _divide_by_start(
    waiting: Sequence[int], starts: Mapping[int, int], swept: SweepResult
) -> tuple[list[int], list[int]]:
    """Return the jobs that can run, because they have no start or it is finished, and those whose start failed."""
    ready, orphans = [], []
    for number in waiting:
        if number not in starts or starts[number] in swept.folders:
            ready.append(number)
        elif starts[number] in swept.failures:
            orphans.append(number)
    return ready, orphans


def _begun(file: Path) -> int:
    """Return how often a job was started without an end, from its progress file."""
    return read_progress(file).get("begun", 0)


def _do_job(
    number: int, job: Job, folder: Path, file: Path, quantities: Mapping[str, Quantity]
) -> tuple[int, str, str]:
    """Run one job in this process; return its number, its folder and its error."""
    adopt(quantities)  # a worker does not run the script or notebook that registered them
    with _ONE_AT_A_TIME:
        try:
            if _begun(file) >= ATTEMPTS:
                return number, "", _KILLED.format(ATTEMPTS)  # a cluster may restart a job on its own
            os.chdir(folder)  # relative paths start where the sweep was called
            # One thread per process, also for the tokenizers of transformers.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                with accept_interrupts(), writing_progress(ProgressFile(file)):
                    run = train_job(job)
            finally:
                torch.set_num_threads(threads)
        except Exception as error:  # no error of a method or a model may end the other runs
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            return number, getattr(error, "run_path", ""), reason
        return number, str(run.path), ""


def train_job(job: Job) -> Run:
    """Train a job of a sweep and return its run; wait for another process that trains it."""
    while True:
        # A fresh one in every attempt, because the last attempt may have changed it.
        model = job.model if isinstance(job.model, str) else job.model()
        try:
            # The table of the sweep replaces the progress bar.
            return train(model, job.data, job.method, **{**job.settings, "progress": False})
        except StateRemoved as removed:
            return removed.run  # a sweep needs the run, not the model
        except RunLocked:
            time.sleep(_PAUSE)  # a worker that counts as dead may still be training it


def width() -> int:
    """Return a sweep's number of parallel jobs, set by ``joblib.parallel_config``, else the number of cores."""
    return get_active_backend()[1] or cpu_count()


def _source_name(source: Any) -> str:
    """Return the name of a model or task, which is text, or an object that may have a name."""
    return to_words(getattr(source, "name", source))


def _named_settings(job: Job) -> dict[str, Any]:
    """Return the settings of a job that its name may show, as text or numbers."""
    settings: dict[str, Any] = {"lr": job.method.lr, "head_lr": job.method.head_lr}
    for key, value in job.settings.items():
        if key == "metric":
            settings[key] = value and " + ".join(metric.name for metric in resolve(value))
        elif key not in ("seed", "root", "report_to"):
            settings[key] = _setting_phrase(value)
    return settings


def _setting_phrase(value: Any) -> Any:
    """Format a setting for a name; observers show the parameters that differ from their defaults."""
    if not isinstance(value, list | tuple):
        return value
    phrases = []
    for observer in value:
        words = [type(observer).__name__]
        for setting in dataclasses.fields(observer):
            chosen_value = getattr(observer, setting.name)
            if setting.init and isinstance(chosen_value, int | float | str) and chosen_value != setting.default:
                words.append(f"{setting.name} {chosen_value}")
        phrases.append(" ".join(words))
    return " + ".join(phrases) or "nothing"
