"""Loading of run folders, and of adapters that were trained elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import is_plain, open_tensors, reject_pickles, weight_files
from lorascope.files.typed_json import read_json, to_typed, unreadable
from lorascope.runs.adapter import Adapter
from lorascope.runs.folders import RecipeManifest
from lorascope.runs.formats import find_reader
from lorascope.runs.formats.peft_lora import CONFIG, KINDS, STEM, WEIGHTS, CommonConfig, factor_files, peft_kind
from lorascope.runs.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.formats.stored_update import AdapterFiles
from lorascope.runs.run import Run

MARKS = ("recipe.json", "run.json", CONFIG)


def load(path: str | Path, base: str | Path | None = None) -> Run | Adapter:
    """Open a run or an adapter.

    Parameters
    ----------
    path : path
        Run folder, folder of phases (opens the last phase, with its parents), or adapter folder: of PEFT (LoRA, DoRA,
        AdaLoRA, FourierFT), or in the layout of loralib or of HydraLoRA's authors.
    base : path, optional
        Folder of an adapter's base model; only its safetensors files are read. It adds the quantities that require W₀,
        ``weight_norm`` and ``relative_update``, and the full update of DoRA. FourierFT stores no shapes and requires
        it, unless the adapter's configuration names an existing folder.

    Raises
    ------
    FileNotFoundError
        The folder or a part of it does not exist.
    ValueError
        The folder is not a run or an adapter, is broken, or was written by a newer version.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise FileNotFoundError(f"cannot load {printable(path)}: the folder does not exist")
    if not path.is_dir():
        reject_pickles([path])
        raise ValueError(f"cannot load {printable(path)}: it is a file, pass its folder {printable(path.parent)}")
    if is_run(path) and base is not None:
        raise ValueError(f"base must be None for a run, got {printable(base)}: {printable(path)} is a run")
    if is_run(path):
        return Run.read(path / _last_phase(path) if (path / "recipe.json").exists() else path)
    model = None if base is None else PretrainedWeights(base)
    return Adapter(_open_folder(path, model), model)


def is_run(path: str | Path) -> bool:
    """Return whether a folder is a run that lorascope trained or recorded."""
    return any((Path(os.path.expanduser(path)) / mark).exists() for mark in MARKS[:2])


def _open_folder(path: Path, base: PretrainedWeights | None) -> AdapterFiles:
    file = path / CONFIG
    config: dict[str, Any] = read_json(file, dict[str, Any]) if file.exists() else {}
    if "peft_type" in config:
        to_typed(config, CommonConfig, file)
    files = tuple(open_tensors(each) for each in _weight_files(path))
    reader = find_reader(config, {name for each in files for name in each})
    if reader is not None:
        return reader.read(path, config, files, base)
    if config:
        to_typed(config, CommonConfig, file)
        raise unreadable(path, f"type of adapter must be one of {', '.join(KINDS)}, got {printable(peft_kind(config))}")
    raise ValueError(f"cannot load {printable(path)}: it is neither a run nor an adapter{_hint(path)}")


def _weight_files(path: Path) -> list[Path]:
    """Return the files of an adapter's weights: those with PEFT's name, else those with factors, else all."""
    files = weight_files(path, STEM) or factor_files(path) or sorted(path.glob("*.safetensors"))
    if not files and (path / CONFIG).exists():
        reject_pickles(path.glob(f"*{STEM}*"))
        raise FileNotFoundError(f"cannot read {printable(path)}: it has {CONFIG} but no {WEIGHTS}")
    return files


def _last_phase(path: Path) -> str:
    file = path / "recipe.json"
    recipe = read_json(file, RecipeManifest)
    last = recipe.phases[-1]
    if not is_plain(last):
        raise unreadable(file, f"a phase must be a folder next to it, got {printable(last)!r}")
    if recipe.status != "done":
        raise ValueError(
            f"cannot load {printable(path)}: it is {recipe.status}, in phase {printable(last)}; "
            "the same call of train resumes it"
        )
    return last


def _hint(path: Path) -> str:
    """Return what the folder contains instead of a run or an adapter, for an error message."""
    inside = sorted(child.name for child in path.iterdir() if any((child / mark).exists() for mark in MARKS))
    if inside:
        return f"; it has {len(inside)} in subfolders, such as {printable(path / inside[-1])}"
    if (path / "config.json").exists():
        return "; it looks like a whole model, which `lorascope inspect PATH --base DIR` compares with its base"
    reject_pickles(path.iterdir())
    return f"; expected one of the files {', '.join(MARKS)}"
