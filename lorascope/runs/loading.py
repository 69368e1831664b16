"""Loading of run folders, and of adapters that were trained elsewhere, one or the checkpoints of one training."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorascope.files.file_names import folder_of, is_plain
from lorascope.files.gguf_io import GgufFile
from lorascope.files.hub import WEIGHTS, locate, locate_base
from lorascope.files.printable import first_of, printable
from lorascope.files.safetensors_io import TensorFile, is_pickle, open_tensors, reject_pickles, weight_files
from lorascope.files.typed_json import read_json, to_typed, unreadable
from lorascope.formats import find_reader, find_sentence
from lorascope.formats.peft_config import CONFIG, KINDS, STEM, CommonConfig, peft_kind
from lorascope.formats.peft_lora import factor_files
from lorascope.formats.peft_merge import MERGED
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.stored_update import AdapterFiles
from lorascope.runs.adapter import Adapter
from lorascope.runs.checkpoint_names import by_step, checkpoint_step, find_checkpoints
from lorascope.runs.folders import MANIFESTS, RecipeManifest
from lorascope.runs.run import Run
from lorascope.runs.series import Series

# Metadata of a header that describes an adapter: of diffusers, kohya and GGUF. Others are notes of the program.
_DESCRIBES = re.compile(r"lora_adapter_metadata$|ss_|modelspec\.|general\.|adapter\.")
MARKS = (*MANIFESTS, CONFIG)
_MAX_DEPTH = 2  # folders below the one to load, such as name and checkpoint of a training
_MOST_COMPARED = 26
_MAX_LISTED = 8


class NoUpdatesError(ValueError):
    """Error on loading an adapter of a ``kind`` without weight updates, such as a prompt; ``sentence`` describes it."""

    def __init__(self, path: Path, sentence: str, kind: str) -> None:
        super().__init__(f"cannot load {printable(path)}: {sentence}")
        self.sentence, self.kind = sentence, kind


def load(path: str | Path, base: str | Path | None = None) -> Run | Adapter | Series:
    """Load a run, an adapter, or the checkpoints of one training.

    Parameters
    ----------
    path : path or str
        Run folder, folder of phases (opens the last phase, with its parents), adapter folder, a single ``.safetensors``
        or ``.gguf`` file, or an adapter on the Hugging Face Hub: ``"user/adapter"``, ``"user/adapter@revision"`` or
        ``"hf://user/adapter/folder"``. A local path comes first. A folder that is not an adapter itself, but has
        adapters in subfolders such as ``checkpoint-10``, opens as a series, see ``load_series``. Any other folder opens
        the only run, adapter or series in it, at most two folders down.
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
    path = locate_result(path)
    if is_run(path):
        if base is not None:
            raise ValueError(f"base must be None for a run, got {printable(base)}: {printable(path)} is a run")
        if (path / "recipe.json").exists():
            path /= _last_phase(path)
        return Run.read(path)
    if is_series(path):
        return load_series(path, base)
    return _require_own_base(load_adapter(path, base))


def load_series(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[int, str | Path], base: str | Path | None = None
) -> Series:
    """Load the checkpoints of one training as a run with a history of norms, spectra and ranks.

    Parameters
    ----------
    checkpoints : path or str, sequence of them, or mapping step -> path
        Folder with subfolders or files such as ``checkpoint-10``, which may also contain the final adapter; or adapters
        as ``load`` takes them, such as ``["user/adapter@step-100", "user/adapter@step-200"]``. The steps are those in
        the names, see ``checkpoint_step``, or 1, 2, ... in the given order if no name has one.
    base : path or str, optional
        Base model of all checkpoints, see ``load``.

    Returns
    -------
    Series
        Checkpoints whose weights are missing or truncated are skipped with a warning, and listed in ``skipped``.

    Raises
    ------
    FileNotFoundError
        A path does not exist.
    ValueError
        There is no checkpoint that can be read, two have the same step or different base models, or one is not an
        adapter.
    """
    source = ""
    if isinstance(checkpoints, Mapping):
        paths = dict(checkpoints)
    elif isinstance(checkpoints, str | Path):
        folder, source = locate(checkpoints), f"{printable(checkpoints)}: "
        paths = by_step(find_checkpoints(folder))
        if not paths:
            raise ValueError(
                f"cannot load a series from {printable(folder)}: it has no checkpoints; expected subfolders such as "
                "checkpoint-10"
            )
    else:
        paths = by_step(checkpoints)
    adapters: dict[int, Adapter] = {}
    skipped: dict[int, str] = {}
    for step, name in sorted(paths.items()):
        path = locate(name)
        if (reason := _missing_weights(path)) is not None:
            skipped[step] = reason
        else:
            adapters[step] = load_adapter(path, base)
    if not adapters:
        reason = next(iter(skipped.values()), "expected at least one checkpoint, got none")
        raise ValueError(f"cannot load a series: {source}none of its checkpoints can be read: {reason}")
    for reason in skipped.values():
        warnings.warn(f"skipped a checkpoint: {reason}", stacklevel=2)
    series = Series(adapters, skipped)
    _require_own_base(series.last)  # a series has one base
    return series


def _missing_weights(path: Path) -> str | None:
    """Return why a checkpoint has no complete weights, as when it was being written; None if it has."""
    try:
        files = _open_files(path)
    except (FileNotFoundError, ValueError) as error:
        return printable(error)
    if not files:
        return f"{printable(path)} has no weights"
    return None


def _require_own_base(adapter: Adapter) -> Adapter:
    """Return an adapter; a ValueError reports a base that has none of its modules."""
    if adapter.base is not None and not any(map(adapter.base.has_weight, adapter.files.parts)):
        raise ValueError(
            f"cannot use {printable(adapter.base.folder)} as the base of {printable(adapter.files.path)}: "
            "it has no weight of any adapted module"
        )
    return adapter


def load_adapter(path: Path, base: str | Path | None) -> Adapter:
    """Load an adapter with a base that may be another model than its own; see ``load``."""
    model = None
    if base is not None:
        model = PretrainedWeights(locate_base(base))
    files = _open_adapter(path, model)
    return Adapter(files, files.base or model)


def locate_result(name: str | Path) -> Path:
    """Return the path to load: that of `hub.locate`, or of the only run, adapter or series below such a folder."""
    path = locate(name)
    if _may_be_result(path):
        return path
    results = list(_find_results(path, _MAX_DEPTH))
    if len(results) == 1:
        return results[0]
    return path  # opening it lists the results


def runs_in(name: str) -> list[Path]:
    """Return the runs in a folder that is not a run, such as that of a sweep; empty if it also has other results."""
    path = Path(os.path.expanduser(name))
    if _may_be_result(path):
        return []
    results = list(_find_results(path, _MAX_DEPTH))
    # Pairs of more runs take minutes, and survey lists any number.
    if not 1 < len(results) <= _MOST_COMPARED or not all(map(is_run, results)):
        return []
    return results


def _may_be_result(path: Path) -> bool:
    """Return whether a path is not a folder that can only contain runs, adapters or series in its subfolders."""
    if not path.is_dir() or is_run(path) or (path / CONFIG).exists():
        return True
    return any(path.glob("*.safetensors")) or is_series(path)


def _find_results(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the runs, adapters and series in subfolders, sorted by path; hidden folders are skipped."""
    for path in sorted(folder.glob("*")):  # an unreadable folder has no entries
        if not path.is_dir() or path.name.startswith("."):
            continue
        if not _may_be_result(path):
            if depth > 1:
                yield from _find_results(path, depth - 1)
        elif is_run(path) or is_series(path) or _has_adapter(path):
            yield path


def _has_adapter(path: Path) -> bool:
    """Return whether a folder has an adapter, which may be broken, and not only other weights such as a base model."""
    try:
        return is_adapter(path)
    except (OSError, ValueError):
        return False


def is_run(path: str | Path) -> bool:
    """Return whether a folder to load is a run that lorascope trained or recorded."""
    return any((Path(os.path.expanduser(path)) / name).exists() for name in MANIFESTS)


def is_series(path: Path) -> bool:
    """Return whether a folder to load has checkpoints in subfolders, and is neither a run nor an adapter itself."""
    if not path.is_dir() or is_run(path) or (path / CONFIG).exists() or any(path.glob("*.safetensors")):
        return False
    return bool(find_checkpoints(path))


def is_adapter(path: Path) -> bool:
    """Return whether a folder or file to load has tensors of an adapter, or the configuration of one."""
    if path.is_dir() and (path / CONFIG).exists():
        return True
    files = _open_files(path)
    config, names = _configuration(path, files), set().union(*files)
    return find_reader(config, names) is not None or find_sentence(config, names) is not None


def is_whole_model(path: Path) -> bool:
    """Return whether a path to load is a whole model in safetensors files, and neither a run nor an adapter."""
    has_weights = path.suffix == ".safetensors" if path.is_file() else any(path.glob("*.safetensors*"))
    return has_weights and not is_run(path) and not is_adapter(path)


def _open_adapter(path: Path, base: PretrainedWeights | None) -> AdapterFiles:
    files = _open_files(path)
    config = _configuration(path, files)
    # Values of a wrong type are reported here, before readers and sentences use them.
    to_typed(config, CommonConfig, _config_file(path))
    names = set().union(*files)
    if (sentence := find_sentence(config, names)) is not None:
        raise NoUpdatesError(path, sentence(path, config, files, base), peft_kind(config))
    reader = find_reader(config, names)
    if reader is not None:
        # A name in several files means that these are not shards of one adapter.
        if len(names) < sum(map(len, files)):
            paths = ", ".join(printable(file.path.name) for file in files[:3])
            raise unreadable(path, f"it has {len(files)} adapters, pass the path of one: {paths}")
        adapter = reader.read(path, config, files, base)
        return replace(adapter, notes=(*adapter.notes, *_unread_files(path, files)))
    if "peft_type" in config:
        kinds = ", ".join((*KINDS, *MERGED))
        raise unreadable(path, f"type of adapter must be one of {kinds}, got {printable(peft_kind(config))}")
    raise ValueError(f"cannot load {printable(path)}: it is neither a run nor an adapter{_hint(path)}")


def _open_files(path: Path) -> tuple[TensorFile, ...]:
    """Open the weight files of a folder, or a file; GGUF files by their name."""
    if path.suffix == ".gguf" and path.is_file():
        return (GgufFile(path),)
    return tuple(map(open_tensors, _weight_files(path)))


def _unread_files(path: Path, files: Iterable[TensorFile]) -> Iterator[str]:
    """Yield a caution about the other weight files in a folder, except for checkpoints."""
    if not path.is_dir():
        return
    opened = {file.path.name for file in files}
    unread = []
    for file in path.iterdir():
        has_weights = file.suffix in (".safetensors", ".gguf") or is_pickle(file)
        if has_weights and file.name not in opened and checkpoint_step(file) is None:
            unread.append(file.name)
    if unread:
        yield f"other weight files in the folder are not read: {first_of(sorted(unread))}"


def _config_file(path: Path) -> Path:
    return folder_of(path) / CONFIG


def _configuration(path: Path, files: Sequence[TensorFile]) -> dict[str, Any]:
    """Return the configuration of an adapter, or the metadata of the header of its file if it has none.

    A single file has the configuration next to it if its name is one that the configuration describes; checkpoints of
    MLX have a number before it.
    """
    described = path.is_dir() or path.name.lstrip("0123456789").removeprefix("_") in WEIGHTS
    if described and (file := _config_file(path)).exists():
        return read_json(file, dict[str, Any])
    words = files[0].words if files else {}
    return {name: value for name, value in words.items() if _DESCRIBES.match(name)}


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
    # Any other name could lead out of the folder.
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
    results = [result.relative_to(path) for result in _find_results(path, _MAX_DEPTH)]
    if results:
        listing = first_of(results, _MAX_LISTED)
        return f"; pass one of the {len(results)} in its subfolders, which `lorascope survey` lists: {listing}"
    if (path / "config.json").exists():
        return "; it looks like a whole model, which `lorascope inspect PATH --base DIR` compares with its base"
    # A folder of pickles gets the error with the command that converts them.
    reject_pickles(path.iterdir())
    return f"; expected one of the files {', '.join(MARKS)}"
