"""Run folders: removal, locks and atomic creation."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorascope.files.whole_files import is_partial
from lorascope.runs.folders import RunLocked, lock_run, new_folder, remove_run
from lorascope.training.output_folder import prepare_folder
from lorascope.training.run_folder import create_folder

ID = "0123456789ab"
MANIFEST = {
    "id": ID, "status": "done", "schema": 1, "recipe": {"name": "lora"}, "method": {"name": "lora"},
    "checksums": {}, "modules": [], "label": "L",
    "settings": {"steps": 1}, "parameters": {"trained": 1}, "test": {},
    "model": "m", "parents": [], "seed": 0, "states": {}, "task": "t",
}  # fmt: skip
CHECKED = [
    "records.parquet", "predictions.parquet", "snapshots/step-000500.safetensors", "state/last.safetensors",
    "state/best.safetensors",
]  # fmt: skip
OWN = [
    "records.parquet", "predictions.parquet", "snapshots/step-000500.safetensors", "state/last.safetensors",
    "state/best.safetensors", "resume/step-00000500.safetensors", "resume/best-00000400.safetensors",
    "resume/base.safetensors", "snapshots/.step-000501.safetensors.4711.part",
]  # fmt: skip


def make_run(folder: Path, **meta: Any) -> Path:
    """Create a run folder with a file of every kind that training writes."""
    for name in OWN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    checksums = {"checksums": dict.fromkeys(CHECKED, "0")}
    (folder / "run.json").write_bytes(json.dumps(MANIFEST | checksums | meta).encode())
    return folder


def make_recipe(folder: Path, status: str = "done") -> Path:
    make_run(folder / "1-search")
    make_run(folder / "2-retrain", status=status)
    recipe = {"id": ID, "status": status, "phases": ["1-search", "2-retrain"]}
    (folder / "recipe.json").write_bytes(json.dumps(recipe).encode())
    return folder


def tree(folder: Path) -> dict[str, object]:
    """Return the content of a folder by path; symbolic links are not followed."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def locked_elsewhere(folder: Path) -> Iterator[None]:
    """Lock a folder in another process, as training in it does."""
    (ready, signal), (wait, go) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(go)
            with lock_run(folder):
                os.write(signal, b"1")
                os.read(wait, 1)
        finally:
            os._exit(0)
    try:
        os.read(ready, 1)
        yield
    finally:
        os.close(go)
        assert os.waitpid(child, 0)[1] == 0
        for handle in (ready, signal, wait):
            os.close(handle)


@pytest.mark.parametrize("status", ["done", "running", "broken"])
def test_remove_run_removes_only_the_run(tmp_path: Path, status: str) -> None:
    make_run(tmp_path / "run", status=status)
    make_run(tmp_path / "other")
    before = tree(tmp_path / "other")
    remove_run(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert tree(tmp_path / "other") == before


@pytest.mark.parametrize("status", ["done", "running"])
def test_remove_run_removes_a_recipe_with_its_phases(tmp_path: Path, status: str) -> None:
    make_recipe(tmp_path / "recipe", status)
    (tmp_path / "recipe/3-more").mkdir()  # killed before its first file
    remove_run(tmp_path / "recipe")
    assert not any(tmp_path.iterdir())


def write(name: str, text: str = "years of work") -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())

    return act


def foreign_link(folder: Path) -> None:
    elsewhere = folder.parent / "scratch"
    (folder / "state").rename(elsewhere)
    (folder / "state").symlink_to(elsewhere)


def link_in_its_place(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def copy_run(name: str) -> Callable[[Path], None]:
    return lambda folder: (
        shutil.copytree(folder, folder.parent / "copy") and shutil.move(folder.parent / "copy", folder / name)
    )


REFUSED = {
    "another program's run.json": (write("run.json", '{"id": 7, "scripts": ["a"]}'), "run.json"),
    "a run.json with only an id": (write("run.json", json.dumps({"id": ID, "status": "done"})), "run.json"),
    "an invalid id": (write("run.json", json.dumps(MANIFEST | {"id": "my-favourite"})), "run.json"),
    "an invalid status": (write("run.json", json.dumps(MANIFEST | {"status": "succeeded"})), "run.json"),
    "a list": (write("run.json", "[1, 2]"), "run.json"),
    "a cut run.json": (write("run.json", json.dumps(MANIFEST)[:-20]), "run.json"),
    "deep nesting": (write("run.json", "[" * 100_000), "run.json"),
    "a recipe for soup": (write("recipe.json", '{"id": "soup", "status": "done", "phases": ["boil"]}'), "recipe.json"),
    "a foreign phase": (write("1-notes/run.json", '{"id": "x"}'), "1-notes/run.json"),
    "notes": (write("notes.txt"), "notes.txt"),
    "notes of a phase": (write("1-notes/chapter.tex"), "1-notes/chapter.tex"),
    "hidden notes": (write(".notes.part"), ".notes.part"),
    "notes next to snapshots": (write("snapshots/step-mine.safetensors"), "step-mine.safetensors"),
    "a run below the run": (write("copy/run.json"), "copy/run.json"),
    "a copy of the run": (copy_run("1-copy"), "1-copy/"),
    "a copy of the run in its folder of states": (copy_run("state/copy"), "state/copy"),
    "another state": (write("state/best-of-all.safetensors"), "best-of-all"),
    "a snapshot of another run": (write("snapshots/step-000600.safetensors"), "step-000600"),
    "another table": (write("scores.parquet"), "scores.parquet"),
    "a link inside": (foreign_link, "state"),
    "a link in its place": (link_in_its_place, "elsewhere"),
    "a removed folder that is not one": (write("../.run.removed/mine.txt"), "mine.txt"),
}


@pytest.mark.parametrize("fault", list(REFUSED))
def test_remove_run_with_foreign_files_raises_and_changes_nothing(tmp_path: Path, fault: str) -> None:
    change, named = REFUSED[fault]
    make_run(tmp_path / "run")
    change(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"cannot overwrite .*run") as caught:
        prepare_folder(tmp_path / "run", ID, overwrite=True)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["3-copy", "1-search-copy", "1-search/2-copy", "snapshots"])
def test_remove_run_of_a_recipe_with_a_copy_of_a_run_raises_and_changes_nothing(tmp_path: Path, name: str) -> None:
    make_recipe(tmp_path / "run")
    shutil.copytree(tmp_path / "run/2-retrain", tmp_path / "run" / name)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot overwrite .*{name}/.* is not a file of this run"):
        prepare_folder(tmp_path / "run", ID, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["run.json", "records.parquet", "state/last.safetensors"])
def test_remove_run_of_a_recipe_with_files_of_a_run_raises_and_changes_nothing(tmp_path: Path, name: str) -> None:
    make_recipe(tmp_path / "run")
    target = tmp_path / "run" / name
    target.parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "run/2-retrain" / name, target)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot overwrite .*{name} is not a file of this run"):
        prepare_folder(tmp_path / "run", ID, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["", "1-search", "2-retrain"])
def test_remove_run_of_a_locked_folder_raises(tmp_path: Path, place: str) -> None:
    make_recipe(tmp_path / "run", "running")
    before = tree(tmp_path)
    with locked_elsewhere(tmp_path / "run" / place):
        with pytest.raises(RunLocked, match="another process"):
            prepare_folder(tmp_path / "run", ID, overwrite=True)
        assert tree(tmp_path) == before
    prepare_folder(tmp_path / "run", ID, overwrite=True)
    assert not any(tmp_path.iterdir())


def test_prepare_folder_of_a_running_training_keeps_partial_files(tmp_path: Path) -> None:
    make_run(tmp_path / "run", status="running")
    write(".run.json.4711.part")(tmp_path / "run")
    before = tree(tmp_path)
    prepare_folder(tmp_path / "run", ID, overwrite=False)
    assert tree(tmp_path) == before


def test_lock_ends_with_training_while_a_forked_worker_lives(tmp_path: Path) -> None:
    wait, go = os.pipe()
    with lock_run(tmp_path / "run"):
        if (worker := os.fork()) == 0:
            os.close(go)
            os.read(wait, 1)
            os._exit(0)
    try:
        with lock_run(tmp_path / "run"):
            pass
    finally:
        os.close(go)
        os.close(wait)
        os.waitpid(worker, 0)


def test_lock_of_a_moved_folder_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def moved(path: Any, *flags: int) -> int:
        handle = opened(path, *flags)
        Path(path).rename(tmp_path / "moved")
        Path(path).mkdir()
        return handle

    monkeypatch.setattr(os, "open", moved)
    with pytest.raises(RunLocked), lock_run(tmp_path / "run"):
        pass


def test_remove_run_cleans_up_an_interrupted_removal(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    make_run(tmp_path / ".run.removed")
    (tmp_path / ".run.removed/run.json").unlink()
    remove_run(tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_create_folder_of_a_locked_run_raises(tmp_path: Path) -> None:
    make_run(tmp_path / "run", status="running")
    before = tree(tmp_path)
    with locked_elsewhere(tmp_path / "run"):
        with pytest.raises(RunLocked, match="another process"):
            create_folder(tmp_path / "run", None)
        assert tree(tmp_path) == before
    create_folder(tmp_path / "run", None)
    assert [path.name for path in tmp_path.iterdir()] == [f"run-{ID}"]


def test_create_folder_at_a_file_raises(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match=r"out .*file"):
        create_folder(tmp_path / "run", None)


def test_new_folder_is_complete_or_absent_and_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / ".new.part").mkdir()  # of another program

    def fail() -> None:
        with new_folder(tmp_path / "new") as draft:
            draft.mkdir()
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == [".new.part"]
    with new_folder(tmp_path / "new") as draft:
        draft.mkdir()
        (draft / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("new", "link"):
        with pytest.raises(FileExistsError, match=r"cannot create .*: it exists"), new_folder(tmp_path / name):
            pass
    assert os.readlink(tmp_path / "link") == "nowhere"


@pytest.mark.parametrize(
    ("name", "partial"),
    [(".run.json.4711.part", True), (".notes.part", False), ("run.json.4711.part", False), (".4711.part", False)],
)
def test_is_partial_recognizes_only_own_temporary_names(name: str, partial: bool) -> None:
    assert is_partial(Path(name)) is partial
