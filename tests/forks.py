"""Training in forks of one warm process, which can be killed and resumed, and comparison of run folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import killing
import pandas as pd
import pytest

from lorascope.methods.method import Method, config
from lorascope.schema.records import QUANTITIES
from lorascope.training.session import Session

CIRCUMSTANCES = ("seconds", "total_seconds", "peak_memory", "commit")
WALL_CLOCK = {name for name, quantity in QUANTITIES.items() if quantity.unit == "s"}


def contents(folder: Path) -> dict[str, object]:
    """Return the content of all files in a folder except for wall-clock times and the commit."""
    found: dict[str, object] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.name == "records.parquet":
            table = pd.read_parquet(file)
            kept = table[~table["quantity"].isin(WALL_CLOCK)].reset_index(drop=True)
            found[name] = kept.to_json(double_precision=15)
            found[f"{name} bits"] = kept["value"].to_numpy().tobytes()
        elif file.name == "run.json":
            meta = json.loads(file.read_text(encoding="utf-8"))
            meta["checksums"].pop("records.parquet", None)
            found[name] = {key: value for key, value in meta.items() if key not in CIRCUMSTANCES}
        else:
            found[name] = file.read_bytes()
    return found


def same(first: Path, second: Path) -> None:
    one, two = contents(first), contents(second)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == two[name], name


class Forks:
    """Trains in forks of a warm, single-threaded process."""

    def __init__(self, model: str, table: Path) -> None:
        self.table = table
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, killing.__file__, model, str(table)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, method: str, out: Path, **job: object) -> int:
        self.process.stdin.write(json.dumps({"method": method, "out": str(out), **job}, default=str) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait() == 0


@contextmanager
def interruption_after(finished: int) -> Iterator[None]:
    """Interrupt a training of this process after a step, with a checkpoint of it."""

    def stop(session, *given, record=Session.record):
        record(session, *given)
        if session.step.finished == finished:
            session.checkpoint()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def check_that_a_killed_run_goes_on(forks: Forks, method: Method, folder: Path) -> None:
    """Check that a run killed after each checkpoint of each phase ends bitwise equal to one that was not."""
    job, whole, out = json.dumps(config(method)), folder / "whole", folder / "out"
    assert forks(job, whole) == 0
    for phase in sorted(file.parent.relative_to(whole) for file in whole.rglob("run.json")):
        for step in (2, 4):
            assert forks(job, out, **{"kill after": str(phase / f"resume/step-{step:08d}*")}) == -signal.SIGKILL
            assert {file.parent for file in out.rglob("resume/step-*")} <= {out / phase / "resume"}
    assert forks(job, out) == 0
    same(out, whole)
