"""Output folder of a training run: free, holding this run, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorascope.files.safetensors_io import is_partial, write_json
from lorascope.runs.folders import MANIFESTS, read_manifest, remove_run
from lorascope.runs.run import TRAIN_AGAIN, Run
from lorascope.training.checkpoints import Checkpoints
from lorascope.training.run_spec import Plan


class StateRemoved(ValueError):
    """A finished run was found whose saved parameters were removed, so that the model cannot be set to them.

    Parameters
    ----------
    run : Run
    """

    def __init__(self, run: Run) -> None:
        super().__init__(f"cannot restore run {run.id}: its state was removed to save disk space. {TRAIN_AGAIN}")
        self.run = run


def prepare_folder(folder: Path, recipe: str, overwrite: bool) -> None:
    """Make sure that a folder is free, or holds the recipe of this id."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    if not any((folder / name).exists() for name in MANIFESTS):
        if folder.exists() and not all(is_partial(child) for child in folder.iterdir()):
            hint = "so overwrite=True will not remove it: give" if overwrite else "give"
            raise ValueError(f"{folder} is not empty and holds no run, {hint} another folder")
    elif overwrite:
        remove_run(folder)
    else:
        try:
            found = read_manifest(folder)
        except ValueError as error:
            raise ValueError(f"{folder} does not hold a run of lorascope: give another folder ({error})") from error
        if found.id != recipe:
            raise ValueError(f"{folder} holds recipe {found.id}, not {recipe}: give another folder, or overwrite=True")


def write_phases(folder: Path, plan: Plan, names: Sequence[str], status: str) -> None:
    """Write down which phases of a recipe have begun; ``status`` is "running" or "done"."""
    for left in folder.glob(".recipe.json.*"):
        if is_partial(left):
            left.unlink()
    write_json(folder / "recipe.json", {"id": plan.id, "status": status, "phases": list(names)})


def finished_run(path: Path, plan: Plan) -> Run | None:
    """The finished run of this plan in a folder; None where it is yet to be trained or to be gone on with."""
    if not (path / "run.json").exists():
        return None
    run = Run.read(path)
    if run.id != plan.id:
        raise ValueError(f"{path} holds run {run.id}, not {plan.id}: give another folder, or overwrite=True")
    if not run.finished:
        return None
    Checkpoints(path).remove()  # left where the removal was cut short
    return run
