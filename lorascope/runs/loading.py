"""Loading of run folders, and of adapters that were trained elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorascope.files.gguf_io import GgufFile
from lorascope.files.hub import WEIGHTS, locate, locate_base
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile, is_plain, open_tensors, reject_pickles, weight_files
from lorascope.files.typed_json import read_json, to_typed, unreadable
from lorascope.runs.adapter import Adapter
from lorascope.runs.folders import RecipeManifest
from lorascope.runs.formats import find_reader, find_sentence
from lorascope.runs.formats.peft_lora import CONFIG, KINDS, STEM, CommonConfig, factor_files, peft_kind
from lorascope.runs.formats.peft_merge import MERGED
from lorascope.runs.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.formats.stored_update import AdapterFiles
from lorascope.runs.run import Run

# Metadata of a header that describes an adapter: of diffusers, kohya and GGUF. Others are notes of the program.
_DESCRIBES = re.compile(r"lora_adapter_metadata$|ss_|modelspec\.|general\.|adapter\.")
MARKS = ("recipe.json", "run.json", CONFIG)


def load(path: str | Path, base: str | Path | None = None) -> Run | Adapter:
    """Open a run or an adapter.

    Parameters
    ----------
    path : path or str
        Run folder, folder of phases (opens the last phase, with its parents), adapter folder, a single ``.safetensors``
        or ``.gguf`` file, or an adapter on the Hugging Face Hub: ``"user/adapter"``, ``"user/adapter@revision"`` or
        ``"hf://user/adapter/folder"``. A local path comes first.
    base : path or str, optional
        Folder of an adapter's base model, or its name on the hub if the cache contains it; only its safetensors files
        are read. It adds the quantities that require W₀, ``weight_norm`` and ``relative_update``, and the full update
        of DoRA. Some kinds require it, such as FourierFT, which stores no shapes, unless the adapter's configuration
        names an existing folder.

    Raises
    ------
    FileNotFoundError
        The path or a part of it does not exist.
    ValueError
        It is not a run or an adapter, is broken, was written by a newer version, or the hub does not give it.
    """
    path = locate(path)
    if is_run(path) and base is not None:
        raise ValueError(f"base must be None for a run, got {printable(base)}: {printable(path)} is a run")
    if is_run(path):
        return Run.read(path / _last_phase(path) if (path / "recipe.json").exists() else path)
    adapter = load_adapter(path, base)
    if adapter.base is not None and not any(map(adapter.base.has_weight, adapter.files.parts)):
        raise ValueError(
            f"cannot use {printable(adapter.base.folder)} as the base of {printable(path)}: "
            "it has no weight of any adapted module"
        )
    return adapter


def load_adapter(path: Path, base: str | Path | None) -> Adapter:
    """Open an adapter with a base that may be another model than its own; see ``load``."""
    model = None if base is None else PretrainedWeights(locate_base(base))
    files = _open_adapter(path, model)
    return Adapter(files, files.base or model)


def describe_without_updates(path: Path) -> str | None:
    """Return the sentence about an adapter that changes no weights, such as a trained prompt; None for all others."""
    if is_run(path) or not is_adapter(path):
        return None
    files = _open_files(path)
    config = _configuration(path, files)
    say = find_sentence(config, {name for each in files for name in each})
    return None if say is None else say(path, config, files)


def is_run(path: str | Path) -> bool:
    """Return whether a folder is a run that lorascope trained or recorded."""
    return any((Path(os.path.expanduser(path)) / mark).exists() for mark in MARKS[:2])


def is_adapter(path: Path) -> bool:
    """Return whether a folder or file has tensors of an adapter, or the configuration of one."""
    if path.is_dir() and (path / CONFIG).exists():
        return True
    files = _open_files(path)
    config, names = _configuration(path, files), {name for file in files for name in file}
    return find_reader(config, names) is not None or find_sentence(config, names) is not None


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a whole model in safetensors files, and neither a run nor an adapter."""
    whole = path.suffix == ".safetensors" if path.is_file() else any(path.glob("*.safetensors*"))
    return whole and not is_run(path) and not is_adapter(path)


def _open_adapter(path: Path, base: PretrainedWeights | None) -> AdapterFiles:
    files = _open_files(path)
    config = _configuration(path, files)
    if "peft_type" in config:
        to_typed(config, CommonConfig, _config_file(path))
    names = {name for each in files for name in each}
    if (say := find_sentence(config, names)) is not None:
        raise ValueError(f"cannot load {printable(path)}: {say(path, config, files)}")
    reader = find_reader(config, names)
    if reader is not None:
        return reader.read(path, config, files, base)
    if "peft_type" in config:
        raise unreadable(
            path, f"type of adapter must be one of {', '.join((*KINDS, *MERGED))}, got {printable(peft_kind(config))}"
        )
    raise ValueError(f"cannot load {printable(path)}: it is neither a run nor an adapter{_hint(path)}")


def _open_files(path: Path) -> tuple[TensorFile, ...]:
    """Open the weight files of a folder, or a file; GGUF files by their name."""
    if path.suffix == ".gguf" and path.is_file():
        return (GgufFile(path),)
    return tuple(map(open_tensors, _weight_files(path)))


def _config_file(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / CONFIG


def _configuration(path: Path, files: Sequence[TensorFile]) -> dict[str, Any]:
    """Return the configuration of an adapter, or the metadata of the header of its file if it has none.

    A single file has the configuration next to it if its name is one that the configuration describes; checkpoints of
    MLX have a number before it.
    """
    described = path.is_dir() or path.name.lstrip("0123456789").removeprefix("_") in WEIGHTS
    if described and (file := _config_file(path)).exists():
        return read_json(file, dict[str, Any])
    return {name: value for name, value in files[0].words.items() if _DESCRIBES.match(name)} if files else {}


def _weight_files(path: Path) -> list[Path]:
    """Return the files of an adapter's weights: those with a known name, else those with factors, else all."""
    if not path.is_dir():
        reject_pickles([path])
        return [path]
    for name in WEIGHTS:
        if files := weight_files(path, name.removesuffix(".safetensors")):
            return files
    files = factor_files(path) or sorted(path.glob("*.safetensors"))
    if not files and (path / CONFIG).exists():
        reject_pickles(path.glob(f"*{STEM}*"))
        raise FileNotFoundError(f"cannot read {printable(path)}: it has {CONFIG} but no {STEM}.safetensors")
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
    if not path.is_dir():
        return "; no tensor has the name of an adapter's factor"
    inside = sorted(child.name for child in path.iterdir() if any((child / mark).exists() for mark in MARKS))
    if inside:
        such = f"such as {printable(path / inside[-1])}"
        return f"; it has {len(inside)} in subfolders, {such}, which `lorascope survey` lists"
    if (path / "config.json").exists():
        return "; it looks like a whole model, which `lorascope inspect PATH --base DIR` compares with its base"
    reject_pickles(path.iterdir())
    return f"; expected one of the files {', '.join(MARKS)}"
