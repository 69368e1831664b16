"""Sweeps whose processes get signals: Ctrl-C in a terminal, and workers killed from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow

SWEEP = """
task = "{task}"
model = "{model}"
method = ["lora"]
seeds = 2
root = "{root}"
settings = {{steps = {steps}, batch_size = 4, eval_every = 0, checkpoint_every = 5}}
"""


@pytest.fixture
def start(bert: str, task: Any, tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Return a function that starts a sweep with a number of steps per run, as the leader of its process group."""
    task.table[["text", "label"]].to_csv(tmp_path / "toy.csv", index=False)
    started = []

    def start_sweep(steps: int) -> subprocess.Popen[str]:
        text = SWEEP.format(task=tmp_path / "toy.csv", model=bert, root=tmp_path / "runs", steps=steps)
        (tmp_path / "sweep.toml").write_text(text, encoding="utf-8")
        words = [
            sys.executable,
            "-m",
            "lorascope.cli",
            "sweep",
            tmp_path / "sweep.toml",
            "--jobs",
            "2",
            "--no-progress",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(words, text=True, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield start_sweep
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def workers(process: subprocess.Popen[str]) -> list[Any]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "joblib.externals.loky.backend.popen_loky_posix" in child.cmdline()]


def await_moment(process: subprocess.Popen[str], folder: Path, moment: str) -> None:
    while process.poll() is None:
        steps = [note for note in folder.glob("runs/.sweep-*/*.json") if '"step"' in note.read_text(encoding="utf-8")]
        if workers(process) if moment == "imports of the workers" else len(steps) == 2:
            break
        time.sleep(0.05)
    time.sleep(0.3)


@pytest.mark.parametrize("moment", ["imports of the workers", "training"])
def test_ctrl_c_in_a_sweep_prints_one_line_and_ends_the_workers(start: Any, tmp_path: Path, moment: str) -> None:
    process = start(5000)
    await_moment(process, tmp_path, moment)
    running = workers(process)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate()
    line = "lorascope: interrupted; 0 of 2 runs are finished, repeat the same command to resume\n"
    assert (process.returncode, output) == (130, ("", line))
    psutil.wait_procs(running, timeout=20)
    assert len(running) == 2
    assert not [worker for worker in running if worker.is_running()]


def test_ctrl_c_twice_in_a_sweep_prints_one_line(start: Any, tmp_path: Path) -> None:
    process = start(5000)
    await_moment(process, tmp_path, "training")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    _, errors = process.communicate()
    assert len(errors.splitlines()) == 1
    assert process.returncode in (130, -signal.SIGINT)  # 130 in a shell, also if the second one came at the very end


@pytest.mark.parametrize("count", [1, 2])
def test_worker_killed_amid_training_prints_nothing_and_its_run_resumes(start: Any, tmp_path: Path, count: int) -> None:
    process = start(150)
    await_moment(process, tmp_path, "training")
    for worker in workers(process)[:count]:
        worker.kill()
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "accuracy" in output
