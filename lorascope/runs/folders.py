"""Run folders on disk: files written by lorascope, lock of a running training, and removal.

A folder is not removed if it contains a file that lorascope did not write, or if another process trains in it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from lorascope.files.printable import printable
from lorascope.files.typed_json import read_json
from lorascope.files.whole_files import is_partial

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Files that lorascope writes in a run folder, except manifests.
_RUN_FILE = re.compile(
    r"(records|predictions)\.parquet|snapshots/step-\d+\.safetensors|state/(last|best)\.safetensors"
    r"|resume/((step-\d+|best-\d+|base)\.safetensors|trackers\.json)"
    r"|tensorboard/([\d.]+/)?(events\.out\.tfevents\.[^/]+|hparams\.yml)"
)
MAX_PAGE = 2**27
"""Maximum bytes of a page or log that is read again: enough for an adapter with 100,000 modules."""
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

    The lock also ends with the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
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
        with suppress(OSError):  # closing is not enough: a worker forked meanwhile may have a copy of the handle
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def remove_run(folder: Path) -> None:
    """Remove the folder of a run, or of a recipe with its phases, finished or not.

    Raises
    ------
    RunLocked
        Another process trains in the folder.
    ValueError
        The path is a symbolic link, is not a run folder, or contains files that lorascope did not write.
    """
    refused = f"cannot overwrite {printable(folder)}"
    if folder.is_symlink():
        raise ValueError(
            f"{refused}: it is a symbolic link; use the folder it points to, {printable(folder.resolve())}"
        )
    folder = folder.resolve()
    try:
        identify_folder(folder)
        for phase in _phase_folders(folder):
            with suppress(FileNotFoundError):  # a phase without files yet
                identify_folder(phase)
    except ValueError as error:
        raise ValueError(f"{refused}: it is not a lorascope run ({error})") from error
    with ExitStack() as locks:
        for locked_folder in (folder, *_phase_folders(folder)):
            locks.enter_context(lock_run(locked_folder))
        # Rename first, so that an interrupted removal leaves no folder that looks like a run.
        removed = folder.with_name(f".{folder.name}.removed")
        for checked_folder in (folder, removed):
            if (file := _foreign_file(checked_folder)) is not None:
                raise ValueError(f"{refused}: lorascope did not write {printable(file)}; move it first")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)


def _phase_folders(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if _PHASE.fullmatch(child.name) and child.is_dir()]


def _foreign_file(folder: Path) -> Path | None:
    """Return a file or symbolic link that lorascope did not write (the folder itself if it is a link), or None."""
    if folder.is_symlink():
        return folder
    for parent, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(parent, name)
            if path.is_symlink() or (name in files and not _is_run_file(path, folder)):
                return path
    return None


def _is_run_file(path: Path, folder: Path) -> bool:
    """Return whether lorascope writes a file of this name in a run folder, or in a phase in it."""
    name = path.relative_to(folder)
    if _PHASE.fullmatch(name.parts[0]):
        name = name.relative_to(name.parts[0])
    return _RUN_FILE.fullmatch(name.as_posix()) is not None or str(name) in MANIFESTS or is_partial(path)


def require_absent(path: Path) -> None:
    """Raise a FileExistsError if the path of a new folder or file exists."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"cannot create {path}: it exists, pass a new path")


def require_own(path: Path, *marks: str) -> None:
    """Raise a FileExistsError if a path is a folder, or a file without one of the marks that lorascope writes."""
    if not path.exists():
        return
    is_small = path.is_file() and path.stat().st_size <= MAX_PAGE
    if not (is_small and any(mark.encode() in path.read_bytes() for mark in marks)):
        raise foreign_file_error(path)


def foreign_file_error(path: Path) -> FileExistsError:
    """Return the error for a file or folder that lorascope must not replace."""
    return FileExistsError(f"cannot write {printable(path)}: it exists and was not written by lorascope")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, and rename it if the block ends without an error.

    Raises
    ------
    FileExistsError
        ``path`` exists.
    """
    require_absent(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)  # left by a killed process with the same id
    try:
        yield draft
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
