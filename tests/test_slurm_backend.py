"""Tests of the Slurm backend on processes of this machine: resuming, cap, deaths, requeue and errors."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments import sweep
from lorascope.experiments.executors import use_backend
from lorascope.experiments.grid import Job

pytest.importorskip("submitit")
from submitit.core.job_environment import JobEnvironment

from lorascope.experiments import slurm_backend


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Yield the options of a backend whose jobs are processes of this machine, which can import the tests."""
    path = [str(Path(__file__).parent), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setattr(slurm_backend, "_PAUSE", 0.1)
    # Jobs then need no import of the tests, which takes seconds.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.chdir(tmp_path)
    yield {"name": "slurm", "cluster": "local", "folder": str(tmp_path / "logs"), "timeout_min": 5}
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Call:
    """Call that writes its start and end to a file, and ends its process in the first attempts."""

    def __init__(self, folder: Path, number: int, deaths: int = 0, seconds: float = 0.0) -> None:
        self.folder, self.number, self.deaths, self.seconds = folder, number, deaths, seconds

    def __call__(self) -> list[int]:
        begun = len(list(self.folder.glob(f"start-{self.number}-*")))
        (self.folder / f"start-{self.number}-{begun}").write_text(str(os.getpid()), encoding="utf-8")
        if begun < self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        if not begun:
            time.sleep(self.seconds)
        return [self.number]


def compute(backend, calls, cap):
    """Return the results or errors of calls, which a backend computes with a cap."""
    backend.effective_n_jobs(cap)
    results = []
    for call in calls:
        backend.submit(call, results.append)
    end = time.monotonic() + 240
    while len(results) < len(calls):
        assert time.monotonic() < end
        time.sleep(0.05)
    return results


@pytest.mark.slow
def test_killed_job_is_submitted_again_and_three_deaths_are_an_error(local, tmp_path):
    options = {key: value for key, value in local.items() if key != "name"}
    backend = slurm_backend.SlurmBackend(options)
    results = compute(backend, [Call(tmp_path, 1), Call(tmp_path, 2, deaths=1), Call(tmp_path, 3, deaths=3)], cap=-1)
    assert [1] in results
    assert [2] in results
    (error,) = [result for result in results if isinstance(result, BaseException)]
    assert sweep.is_death(error)
    assert sorted(path.name for path in tmp_path.glob("start-*")) == [
        "start-1-0", "start-2-0", "start-2-1", "start-3-0", "start-3-1", "start-3-2",
    ]  # fmt: skip
    with pytest.raises(type(error)):
        backend.retrieve_result_callback(error)


@pytest.mark.slow
def test_interrupted_job_is_requeued_and_not_submitted_again(local, tmp_path):
    options = {key: value for key, value in local.items() if key != "name"}
    backend = slurm_backend.SlurmBackend(options)
    results = []
    submission = backend.submit(Call(tmp_path, 4, seconds=300), results.append)
    end, file = time.monotonic() + 240, tmp_path / "start-4-0"
    while not (file.exists() and file.read_text(encoding="utf-8")):
        assert time.monotonic() < end
        time.sleep(0.05)
    # As Slurm does before the end of a job.
    os.kill(int(file.read_text(encoding="utf-8")), JobEnvironment._usr_sig())
    while not results:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert results == [[4]]
    assert submission.attempts == 1
    assert len(list(tmp_path.glob("start-4-*"))) == 2


@pytest.mark.slow
def test_cap_limits_the_jobs_at_a_time(local, tmp_path):
    options = {key: value for key, value in local.items() if key != "name"}
    backend = slurm_backend.SlurmBackend(options)
    submitted, highest = backend._executor.submit, []

    def submit(call):
        highest.append(1 + len(backend._running))
        return submitted(call)

    backend._executor.submit = submit
    assert sorted(compute(backend, [Call(tmp_path, number) for number in range(3)], cap=1)) == [[0], [1], [2]]
    assert highest == [1, 1, 1]


def test_requeued_call_is_the_same_call():
    call = slurm_backend.ResumedCall(Call(Path("x"), 3))
    submission = call.checkpoint()
    assert submission.function is call
    assert (submission.args, submission.kwargs) == ((), {})


@pytest.mark.slow
def test_sweep_has_one_job_per_run_and_a_second_call_trains_nothing(local, bert, tmp_path, capsys):
    rows = [
        {"text": f"word{n}", "label": "ab"[n % 2], "split": ("train", "validation", "test")[n % 3]} for n in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"steps": 3, "batch_size": 4, "max_length": 16, "device": "cpu"}
    grid = {
        "model": str(bert),
        "task": "rows.jsonl",
        "method": "lora",
        "seeds": 2,
        "settings": settings,
        "root": "runs",
    }
    first = ls.sweep({**grid, "backend": local}, progress=False)
    assert [run.meta.seed for run in first] == [0, 1]
    assert len(list((tmp_path / "logs").glob("*_submitted.pkl"))) == 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/run.json")}
    again = ls.sweep({**grid, "backend": {"name": "sequential"}}, progress=False)
    assert [run.id for run in again] == [run.id for run in first]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/run.json")} == times
    job = Job("no-such-model", "rows.jsonl", ls.LoRA(), {**settings, "root": "runs"}, "broken")
    with use_backend(**local):
        swept = sweep.run_jobs([job], progress=False)
    assert swept.complaints() == [swept.complaints()[0]]
    assert swept.complaints()[0].startswith("broken: FileNotFoundError: ")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ('{name = "slurm"}', 'cannot use backend slurm: Could not detect "srun"'),
        ('{name = "slurm", cluster = "local", gpus = 1}', "cannot pass these options to backend slurm: "),
        ('{name = "slurm", cluster = "local", address = "x"}', "address must be None for backend slurm, got 'x'"),
        ('{name = "slurm", cluster = "nowhere"}', "cluster must be one of 'slurm', 'local', got 'nowhere'"),
    ],
)
def test_wrong_option_of_slurm_is_one_line(backend, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text(
        f'task = "sentiment"\nmethod = "lora"\nsettings = {{steps = 1}}\nbackend = {backend}\n', encoding="utf-8"
    )
    assert main(["sweep", "plan.toml"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()
