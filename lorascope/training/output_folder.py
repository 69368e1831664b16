"""Checks and manifest of the output folder of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorascope.files.whole_files import is_partial, write_json
from lorascope.runs.folders import MANIFESTS, identify_folder, remove_run
from lorascope.runs.run import TRAIN_AGAIN, Run
from lorascope.training.checkpoints import Checkpoints
from lorascope.training.run_spec import RunSpec


class StateRemoved(ValueError):
    """Error for an output folder with a finished run whose saved parameters were removed: it cannot be restored."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"cannot restore run {run.id}: its state was removed to save disk space. {TRAIN_AGAIN}")
        self.run = run


def prepare_folder(folder: Path, recipe: str, overwrite: bool) -> None:
    """Raise a ValueError unless an output folder is free or of this recipe; ``overwrite`` removes the run in it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {folder}")
    if not any((folder / name).exists() for name in MANIFESTS):
        if folder.exists() and not all(map(is_partial, folder.iterdir())):
            hint = ", and overwrite=True only removes runs" if overwrite else ""
            raise ValueError(f"cannot train in {folder}: it contains files but no run{hint}; pass another out")
    elif overwrite:
        remove_run(folder)
    else:
        try:
            stored = identify_folder(folder)
        except ValueError as error:
            raise ValueError(f"cannot train in {folder}: it is not a run ({error}); pass another out") from error
        if stored.id != recipe:
            raise _other_run(folder, "recipe", stored.id, recipe)


def write_phases(folder: Path, plan: RunSpec, names: Sequence[str], status: str) -> None:
    """Write ``recipe.json`` to an output folder: the phases that have started, and status, "running" or "done"."""
    # A process that was killed while it wrote the file leaves a draft under its own process id.
    for left in folder.glob(".recipe.json.*"):
        if is_partial(left):
            left.unlink()
    write_json(folder / "recipe.json", {"id": plan.id, "status": status, "phases": list(names)})


def finished_run(path: Path, plan: RunSpec) -> Run | None:
    """Return the finished run of this plan in an output folder, or None if it must be trained or resumed.

    Raise a ValueError if the folder contains another run.
    """
    if not (path / "run.json").exists():
        return None
    run = Run.read(path)
    if run.id != plan.id:
        raise _other_run(path, "run", run.id, plan.id)
    if not run.finished:
        return None
    Checkpoints(path).remove()  # the process may have died while it removed them
    return run


def _other_run(folder: Path, kind: str, stored_id: str, run_id: str) -> ValueError:
    return ValueError(
        f"cannot train {kind} {run_id} in {folder}: it contains {kind} {stored_id}; "
        "pass another out, or overwrite=True (--overwrite)"
    )
