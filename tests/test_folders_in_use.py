"""Run folders in use: forked processes leave them unchanged, and nothing is written into a folder in their place."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_any_loop import Loop
from test_folders import tree

import lorascope as ls
from lorascope.runs.folders import RunLocked, lock_run
from lorascope.training import run_folder
from lorascope.training.session import Session

FORKED = """
import os, sys, torch
import lorascope as ls
from lorascope.runs.folders import RunLocked, lock_run

model = torch.nn.Linear(4, 2)
recorder = ls.record(model, torch.optim.SGD(model.parameters(), lr=0.1), sys.argv[1])

def leave():
    sys.exit(0)

def leave_block():
    with recorder:
        sys.exit(0)

def close():
    recorder.close()
    sys.exit(0)

def delete():
    globals().pop("recorder")
    sys.exit(0)

def fail():
    with recorder:
        raise RuntimeError("in the child")

before = {path: path.read_bytes() for path in recorder._recording.path.rglob("*") if path.is_file()}
if (child := os.fork()) == 0:
    sys.stderr = open(os.devnull, "w")
    globals()[sys.argv[2]]()
os.waitpid(child, 0)
after = {path: path.read_bytes() for path in recorder._recording.path.rglob("*") if path.is_file()}
assert after == before, "the child has written into the folder"
try:
    with lock_run(recorder._recording.path):
        raise AssertionError("the folder is not locked")
except RunLocked:
    pass
assert recorder.close().finished
"""


@pytest.mark.parametrize("way", ["leave", "leave_block", "close", "delete", "fail"])
def test_forked_process_neither_unlocks_nor_changes_the_folder_of_a_recorder(tmp_path: Path, way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path / "run"), way], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ls.load(tmp_path / "run").finished


def test_lock_outlives_a_forked_process_that_leaves_its_block(tmp_path: Path) -> None:
    child = -1
    try:
        with lock_run(tmp_path / "run"):
            child = os.fork()
            if child == 0:
                raise SystemExit
            os.waitpid(child, 0)
            with pytest.raises(RunLocked), lock_run(tmp_path / "run"):
                pass
    finally:
        if child == 0:
            os._exit(0)
    with lock_run(tmp_path / "run"):
        pass


def make_anew(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work", encoding="utf-8")


def make_foreign_run(folder: Path) -> None:
    make_anew(folder)
    (folder / "run.json").write_text('{"id": 7}', encoding="utf-8")


def record_another(folder: Path) -> None:
    Loop(folder).record().close()


@pytest.mark.parametrize("make", [Path.mkdir, make_anew, make_foreign_run, record_another])
def test_recorder_writes_nothing_into_a_folder_that_replaces_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(run_folder, "FLUSH_SECONDS", 0.0)
    loop = Loop(tmp_path / "run")
    recorder = loop.record([ls.observe.factors(every=1)])
    loop.step_and_record(recorder)
    (tmp_path / "run").rename(tmp_path / "moved")
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\nimport test_folders_in_use as test\n"
    code += "Path.mkdir" if make is Path.mkdir else f"test.{make.__name__}"
    subprocess.run([sys.executable, "-c", f"{code}(Path({str(tmp_path / 'run')!r}))"], check=True)
    before = tree(tmp_path / "run")
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path / 'run'}: another folder has taken its place")):
        loop.step_and_record(recorder)
    assert recorder.close() is None
    assert tree(tmp_path / "run") == before
    assert ls.load(tmp_path / "moved").table["step"].max() == 1
    del recorder
    gc.collect()
    assert tree(tmp_path / "run") == before


def test_recorder_resumes_when_its_folder_is_moved_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "FLUSH_SECONDS", 0.0)
    loop = Loop(tmp_path / "run")
    recorder = loop.record([ls.observe.factors(every=1)])
    (tmp_path / "run").rename(tmp_path / "moved")
    make_anew(tmp_path / "run")
    with pytest.warns(UserWarning, match="another folder has taken its place"):
        loop.step_and_record(recorder)
    (tmp_path / "run").rename(tmp_path / "other")
    (tmp_path / "moved").rename(tmp_path / "run")
    loop.step_and_record(recorder)
    run = recorder.close()
    assert run.table.query("quantity == 'loss'")["step"].tolist() == [1, 2]
    assert run.finished


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("remove", [shutil.rmtree, lambda folder: folder.rename(folder.parent / "moved")])
def test_recorder_keeps_all_rows_if_its_folder_is_removed(
    tmp_path: Path, remove: Callable[[Path], object], steps: int
) -> None:
    loop = Loop(tmp_path / "run")
    recorder = loop.record([ls.observe.norms(every=1, spectra_every=1)])
    for _ in range(steps):
        loop.step_and_record(recorder)
    remove(loop.folder)
    loop.step_and_record(recorder)
    run = recorder.close()
    assert run.table.query("quantity == 'loss'")["step"].tolist() == list(range(1, steps + 2))
    for meta in (run.meta, loop.read().meta):
        assert (meta.status, meta.error) == ("broken", "its folder was removed during training")


def test_training_stops_if_another_folder_replaces_its_folder(
    bert: str, task: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def move(session: Session, *values: float, record: Callable[..., None] = Session.record) -> None:
        record(session, *values)
        if session.step.finished == 2:
            out.rename(tmp_path / "moved")
            make_anew(out)

    monkeypatch.setattr(Session, "record", move)
    settings = {"steps": 5, "batch_size": 4, "eval_size": 8, "test_size": 8, "device": "cpu", "progress": False}
    with pytest.raises(OSError, match="another folder has taken its place"):
        ls.train(bert, task, ls.LoRA(rank=2), out=out, checkpoint_every=2, **settings)
    assert tree(out) == {"thesis.tex": b"years of work"}
