"""Run folders on disk: files written by lorascope, lock of a running training, and removal.

A folder is not removed if it contains a file that lorascope did not write, or if another process trains in it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from lorascope.files.printable import printable
from lorascope.files.typed_json import read_json
from lorascope.files.whole_files import draft_path, is_partial, require_absent

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Files that lorascope writes in a run folder, except manifests.
_RUN_FILE = re.compile(
    r"(records|predictions|texts)\.parquet|snapshots/step-\d+\.safetensors|state/(last|best)\.safetensors"
    r"|resume/((step-\d+|best-\d+|base)\.safetensors|trackers\.json)|checkpoints/(step|best)-\d+\.safetensors"
    r"|harness/[0-9a-f]{12}\.json"
    r"|tensorboard/([\d.]+/)?(events\.out\.tfevents\.[^/]+|hparams\.yml)"
)
# The files whose checksums are in the manifest of a run that has ended.
_CHECKED_FILE = re.compile(r"[^/]+\.parquet|(snapshots|state)/[^/]+")
_PHASE = re.compile(r"\d+-.+")  # such as 1-search
_Id = Annotated[str, Meta(pattern="^[0-9a-f]{12}$")]


class RunLocked(ValueError):
    """Error for a run folder in which another process is training."""


@dataclass
class RunManifest:
    """Fields that distinguish a run folder's ``run.json`` from that of another program."""

    id: _Id
    status: Literal["running", "done", "broken"]
    schema: int
    recipe: dict[str, Any]
    checksums: dict[str, str]
    modules: list[dict[str, Any]]


@dataclass
class RecipeManifest:
    """Content of the folder of a recipe, in ``recipe.json``; ``phases`` are the names of the run folders in it."""

    id: _Id
    status: Literal["running", "done"]
    phases: Annotated[list[str], Meta(min_length=1)]


MANIFESTS = ("recipe.json", "run.json")


def identify_folder(folder: Path) -> RunManifest | RecipeManifest:
    """Return the manifest of a recipe's folder if it has one, else that of a run folder; errors as in `read_json`."""
    recipe = folder / "recipe.json"
    return read_json(recipe, RecipeManifest) if recipe.exists() else read_json(folder / "run.json", RunManifest)


def own_files(folder: Path, *patterns: str) -> set[Path]:
    """Return the files at these glob patterns below a run folder that lorascope writes there, except manifests."""
    files: set[Path] = set()
    for pattern in patterns:
        files |= {file for file in folder.glob(pattern) if _RUN_FILE.fullmatch(file.relative_to(folder).as_posix())}
    return files


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock a run folder, created if missing, within the block, where the OS supports it.

    The lock also ends with the process, but not with a process that is forked within the block.
    A ValueError is raised for a symbolic link to a missing folder.
    """
    if folder.is_symlink() and not folder.exists():
        target = printable(folder.readlink())
        raise ValueError(f"cannot use {printable(folder)}: it is a symbolic link to {target}, which does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle, owner = os.open(folder, os.O_RDONLY), os.getpid()
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have moved the folder away between the two calls.
            is_locked = not os.path.samestat(os.fstat(handle), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            is_locked = True
        except OSError:  # a file system without locks
            is_locked = False
        if is_locked:
            raise RunLocked(f"cannot use {folder}: it is being trained by another process, wait until it ends")
        yield
    finally:
        # Closing is not enough, since a forked worker may have a copy of the handle. The worker must not unlock it.
        if os.getpid() == owner:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def remove_run(folder: Path) -> None:
    """Remove the folder of a run, or of a recipe with its phases, finished or not.

    Raises
    ------
    RunLocked
        Another process trains in the folder.
    ValueError
        The path is a symbolic link, is not a run folder, or contains files that are not of this run, such as a copy of
        a run.
    """
    refused = f"cannot overwrite {printable(folder)}"
    if folder.is_symlink():
        raise ValueError(
            f"{refused}: it is a symbolic link; use the folder it points to, {printable(folder.resolve())}"
        )
    folder = folder.resolve()
    try:
        runs = _runs_of(folder)
    except ValueError as error:
        raise ValueError(f"{refused}: it is not a lorascope run ({error})") from error
    with ExitStack() as locks:
        for locked_folder in {folder: None} | runs:
            locks.enter_context(lock_run(locked_folder))
        # Rename first, so that an interrupted removal leaves no folder that looks like a run.
        removed = folder.with_name(f".{folder.name}.removed")
        removed_runs = dict.fromkeys([*_phase_folders(removed), removed])  # its manifests may be gone already
        for checked_folder, checked_runs in ((folder, runs), (removed, removed_runs)):
            if (file := _foreign_file(checked_folder, checked_runs)) is not None:
                raise ValueError(f"{refused}: {printable(file)} is not a file of this run; move it first")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)


def _runs_of(folder: Path) -> dict[Path, RunManifest | None]:
    """Return the manifest of the run in a folder, or those of a recipe's phases; None for one without files yet."""
    manifest = identify_folder(folder)
    if isinstance(manifest, RunManifest):
        return {folder: manifest}
    runs: dict[Path, RunManifest | None] = {}
    for phase in _phase_folders(folder):
        if phase.name in manifest.phases:
            file = phase / "run.json"
            runs[phase] = read_json(file, RunManifest) if file.exists() else None
    return runs


def _phase_folders(folder: Path) -> list[Path]:
    return [child for child in folder.glob("*") if _PHASE.fullmatch(child.name) and child.is_dir()]


def _foreign_file(folder: Path, runs: Mapping[Path, RunManifest | None]) -> Path | None:
    """Return a file or symbolic link that is not of these runs (the folder itself if it is a link), or None."""
    if folder.is_symlink():
        return folder
    for parent, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(parent, name)
            if path.is_symlink() or (name in files and not _is_run_file(path, folder, runs)):
                return path
    return None


def _is_run_file(path: Path, folder: Path, runs: Mapping[Path, RunManifest | None]) -> bool:
    """Return whether lorascope wrote a file in a folder with these runs, judged by its name and their manifests."""
    if is_partial(path) or path == folder / "recipe.json":
        return True
    owner = next((run for run in runs if path.is_relative_to(run)), None)
    if owner is None:
        return False
    name, manifest = path.relative_to(owner).as_posix(), runs[owner]
    if manifest is not None and manifest.status != "running" and _CHECKED_FILE.fullmatch(name):
        return name in manifest.checksums
    return name == "run.json" or _RUN_FILE.fullmatch(name) is not None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, and rename it if the block ends without an error.

    Raises
    ------
    FileExistsError
        ``path`` exists.
    """
    require_absent(path)
    draft = draft_path(path)
    try:
        yield draft
        try:
            draft.rename(path)  # this replaces no file, and no folder with files
        except OSError:
            require_absent(path)  # another process wrote it meanwhile
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
