"""Sweeps: order of runs, skipping, isolated failures, and killed workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from joblib import cpu_count, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from trainers import same_rows

import lorascope as ls
from lorascope.experiments import sweep
from lorascope.experiments.sweep import Job, width
from lorascope.methods import Full, LoRA
from lorascope.runs.folders import lock_run
from lorascope.training.progress import ProgressFile

FAST = {"steps": 3, "batch_size": 4, "eval_every": 0, "progress": False}


class Dying:
    """A model that kills its process."""

    def __call__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def csv(task, path: Path) -> str:
    task.table[["text", "label"]].to_csv(path / "toy.csv", index=False)
    return str(path / "toy.csv")


def test_runs_are_ordered_by_method_then_seed(bert, task, tmp_path):
    methods = [Full(), LoRA(rank=2)]
    runs = ls.sweep(bert, task, methods, seeds=[3, 1], jobs=1, root=tmp_path, **FAST)
    assert [(run.meta.method["name"], run.meta.seed) for run in runs] == [
        ("full", 3), ("full", 1), ("lora", 3), ("lora", 1),
    ]  # fmt: skip
    assert all(run.finished for run in runs)
    assert ls.plots.update_norm(runs).data["n"].eq(2).any()  # seeds of one recipe share one band


def test_finished_run_is_not_trained_again(bert, task, tmp_path):
    first = ls.sweep(bert, task, LoRA(), seeds=1, jobs=1, root=tmp_path, **FAST)
    stamp = (first[0].path / "run.json").stat().st_mtime_ns
    both = ls.sweep(bert, task, LoRA(), seeds=2, jobs=1, root=tmp_path, **FAST)
    assert both[0].id == first[0].id
    assert (first[0].path / "run.json").stat().st_mtime_ns == stamp


def test_failed_run_leaves_the_others(bert, task, tmp_path):
    methods = [LoRA(), LoRA(targets="nowhere")]
    with pytest.raises(
        RuntimeError, match=r"1 of 2 runs failed.*targets nowhere, seed 0: .*'nowhere' matches no module"
    ):
        ls.sweep(bert, task, methods, seeds=1, jobs=1, root=tmp_path, **FAST)
    (kept,) = tmp_path.glob("*/run.json")
    assert ls.load(kept.parent).finished


@dataclass(kw_only=True)
class Careless(LoRA):
    """A method that fails with an unexpected error."""

    def before_step(self, step):
        assert step.index == 0


def test_unexpected_error_leaves_the_other_runs(bert, task, tmp_path):
    with pytest.raises(RuntimeError, match=r"1 of 3 runs failed.*Careless.*: AssertionError"):
        ls.sweep(bert, task, [LoRA(), Careless(), Full()], seeds=1, jobs=1, root=tmp_path, **FAST)
    assert sorted(ls.load(path.parent).finished for path in tmp_path.glob("*/run.json")) == [False, True, True]


def test_width_follows_parallel_config():
    assert width() == cpu_count()
    with parallel_config("loky", n_jobs=3):
        assert width() == 3


@pytest.mark.slow
def test_worker_that_always_dies_is_reported(bert, task, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "ATTEMPTS", 2)  # each attempt starts new processes
    with pytest.raises(RuntimeError, match=r"1 of 1 runs failed.*LoRA, seed 0: its worker was killed 2 times"):
        ls.sweep(Dying(), csv(task, tmp_path), LoRA(), seeds=1, jobs=2, root=tmp_path, **FAST)


class Hoarding:
    """A model whose memory stays occupied after its run."""

    memory: ClassVar[list[bytes]] = []

    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        self.memory.append(b"x" * 350_000_000)
        time.sleep(1.1)  # joblib looks at the memory of a worker once a second
        return ls.models.load(self.folder)


@pytest.mark.slow
def test_replaced_worker_is_not_remarked(bert, task, tmp_path, recwarn):
    ls.sweep(Hoarding(bert), csv(task, tmp_path), LoRA(), seeds=6, jobs=2, root=tmp_path, **FAST)
    assert not [str(warning.message) for warning in recwarn if "worker stopped" in str(warning.message)]


class Pool:
    """Pool like loky: two jobs at a time, and a dying worker aborts the other job, too."""

    def __init__(self, **options):
        self.begun = []

    def __call__(self, calls):
        calls = list(calls)
        for number, (work, (_, job, here, file, quantities), _) in enumerate(calls):
            self.begun = [call[1][3] for call in calls[number : number + 2]]
            result = job.model == "mortal" and sweep.read_progress(file).get("begun", 0) < sweep.ATTEMPTS
            if result:
                for each in self.begun:
                    ProgressFile(each)
                raise TerminatedWorkerError("killed")
            yield work(calls[number][1][0], job, here, file, quantities)


def test_job_that_always_kills_its_worker_leaves_the_others(bert, task, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "Parallel", Pool)
    settings = {"steps": 1, "batch_size": 4, "eval_every": 0, "root": tmp_path}
    wanted = [Job(model, task, LoRA(), {**settings, "seed": seed}) for seed, model in enumerate([bert, "mortal", bert])]
    swept = sweep.run_jobs(wanted, 2, progress=False)
    assert sorted(swept.folders) == [0, 2]
    assert swept.complaints() == ["LoRA, mortal, seed 1: its worker was killed 3 times, out of memory?"]


def test_workers_that_never_start_are_reported(bert, task, tmp_path, monkeypatch):
    class Stillborn:
        def __init__(self, **options):
            pass

        def __call__(self, calls):
            raise TerminatedWorkerError("killed")

    monkeypatch.setattr(sweep, "Parallel", Stillborn)
    swept = sweep.run_jobs([Job(bert, task, LoRA(), {"steps": 1, "root": tmp_path})], 2, progress=False)
    assert swept.complaints() == ["LoRA, seed 0: 3 workers were killed before it started"]


def test_locked_run_is_waited_for(bert, task, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_PAUSE", 0.05)
    (run,) = ls.sweep(bert, task, LoRA(), seeds=1, jobs=1, root=tmp_path, **FAST)
    text = (run.path / "run.json").read_text(encoding="utf-8")
    (run.path / "run.json").write_text(text.replace('"status": "done"', '"status": "running"'))

    def hold():
        with lock_run(run.path):
            taken.set()
            time.sleep(0.5)
            # Replaced as a whole: the sweep must not read a half-written file.
            (tmp_path / "done.json").write_text(text, encoding="utf-8")
            (tmp_path / "done.json").replace(run.path / "run.json")

    taken = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(60)
    (again,) = ls.sweep(bert, task, LoRA(), seeds=1, jobs=1, root=tmp_path, **FAST)
    holder.join()
    assert again.id == run.id


@dataclass(kw_only=True)
class Mortal(LoRA):
    """Method that logs every step, and kills its process at step 2 of the first run to reach it."""

    notes: str = ""

    def before_step(self, step):
        seed, killed = torch.initial_seed(), Path(self.notes, "killed")
        with Path(self.notes, f"seed-{seed}").open("a", encoding="utf-8") as file:
            file.write(f"{step.index}\n")
        if step.index == 2:
            try:
                killed.touch(exist_ok=False)
            except FileExistsError:
                return
            killed.write_text(str(seed), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)


def check_no_step_is_lost(bert, task, folder, backend):
    """Check that a run killed after two of four steps resumes there and ends like an uninterrupted one."""
    method = Mortal(rank=2, notes=str(folder))
    settings = {"steps": 4, "batch_size": 4, "eval_every": 0, "checkpoint_every": 1}
    grid = {"model": bert, "task": csv(task, folder), "method": method, "seeds": 2, "settings": settings}
    runs = ls.sweep({**grid, "root": str(folder / "runs"), "backend": backend}, progress=False)
    done = (folder / f"seed-{(folder / 'killed').read_text(encoding='utf-8')}").read_text(encoding="utf-8").split()
    assert done == ["0", "1", "2", "2", "3"]
    assert [run.meta.seed for run in runs] == [0, 1]
    whole = ls.sweep({**grid, "root": str(folder / "whole"), "backend": {"name": "sequential"}}, progress=False)
    for run, other in zip(runs, whole, strict=True):
        assert run.finished
        assert run.path != other.path
        same_rows(run.table, other.table, but=["seconds"])


@pytest.mark.slow
def test_killed_loky_worker_loses_no_step(bert, task, tmp_path):
    check_no_step_is_lost(bert, task, tmp_path, {"name": "loky", "jobs": 2})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # raised by distributed itself
def test_killed_dask_worker_loses_no_step(bert, task, tmp_path):
    distributed = pytest.importorskip("distributed")
    place = {"dashboard_address": None, "local_directory": str(tmp_path / "dask")}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **place) as cluster:
        backend = {"name": "dask", "address": cluster.scheduler_address}
        check_no_step_is_lost(bert, task, tmp_path, backend)
        assert not [client for client in distributed.Client._instances if client.status == "running"]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # raised by ray itself
def test_killed_ray_worker_loses_no_step(bert, task, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", object_store_memory=10**8)
    try:
        check_no_step_is_lost(bert, task, tmp_path, {"name": "ray", "ray_remote_args": {"num_cpus": 1}})
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"method": LoRA(), "seeds": 0}, "seeds must be an integer >= 1 or a list of integers .*, got 0"),
        ({"method": LoRA(), "seeds": []}, r"seeds must be .*, got \[\]"),
        ({"method": []}, "method must be a method or a list of methods, got none"),
        ({"data": None, "seeds": 5}, "or only a grid, which contains them and seeds"),
    ],
)
def test_sweep_of_nothing_is_rejected(given, reason, bert, task, tmp_path):
    with pytest.raises(ValueError, match=reason):
        ls.sweep(bert, **{"data": task, **given}, root=tmp_path, **({} if "data" in given else FAST))


OWN_OBSERVER = """
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import lorascope as ls
from lorascope.schema.records import Quantity, register

register("train with observe=[counts()]", count=Quantity("count", definition="number of finished steps"))


@dataclass(kw_only=True)
class counts(ls.observe.Observer):
    def __call__(self, step: ls.Step) -> Iterator[ls.Record]:
        yield ls.Record("count", step.finished)


if __name__ == "__main__":
    settings = {"steps": 2, "batch_size": 4, "eval_size": 8, "observe": ["counts"]}
    job = {"model": sys.argv[1], "task": sys.argv[2], "method": "lora", "seeds": 1, "settings": settings}
    (run,) = ls.sweep(job, progress=False)
    print(run.table.query("quantity == 'count'")["value"].tolist())
"""


@pytest.mark.slow
def test_observer_and_quantity_of_a_script_reach_the_workers(bert, task, tmp_path):
    (tmp_path / "script.py").write_text(OWN_OBSERVER)
    task.table[["text", "label"]].to_csv(tmp_path / "reviews.csv", index=False)
    command = [sys.executable, "script.py", bert, "reviews.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[0.0, 1.0, 2.0]\n", done.stderr
