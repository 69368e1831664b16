"""Folders on the disk as Runs: those that ``train`` wrote, and adapters that were trained elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import is_plain, refuse_pickles
from lorascope.files.typed_json import read_json
from lorascope.runs.display import largest_lines
from lorascope.runs.formats.hydralora import has_heads, read_hydra
from lorascope.runs.formats.loralib import read_loralib
from lorascope.runs.formats.peft_adalora import read_adalora
from lorascope.runs.formats.peft_dora import read_dora
from lorascope.runs.formats.peft_fourierft import named_base, read_fourier
from lorascope.runs.formats.peft_lora import CONFIG, AdapterFiles, factor_files, open_adapter, read_adapter
from lorascope.runs.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.layout import Lazy
from lorascope.runs.manifest import Recipe
from lorascope.runs.run import Run
from lorascope.runs.summary import SUMMARY
from lorascope.schema import records
from lorascope.schema.module_roles import parse
from lorascope.schema.records import Record
from lorascope.updates.linalg import root_of_squares
from lorascope.updates.low_rank import Dense, LowRank, effective_rank, spectra, stable_rank, weight_norm

# Values of the factors in memory at once; a layer of a large model has 10 million at rank 64.
_BATCH = 2**26
MARKS = ("recipe.json", "run.json", CONFIG)


def load(path: str | Path, base: str | Path | None = None) -> Run:
    """Open a folder as a Run.

    Parameters
    ----------
    path : path
        A run folder, a folder of phases (the last phase is opened, its parents with it), or an adapter: of PEFT
        (LoRA, DoRA, AdaLoRA, FourierFT), or in the layout of loralib or of HydraLoRA's authors.
    base : path, optional
        Folder of an adapter's base model, of which only safetensors files are read: gives the adapter what needs W_0,
        ``weight_norm`` and ``relative_update``, and DoRA the whole of its update. FourierFT keeps no shapes and needs
        it, unless the adapter's own configuration names a folder that is there.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or a part of it is missing.
    ValueError
        It is none of the three, broken, or written by a newer version.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {printable(path)}")
    if not path.is_dir():
        refuse_pickles([path])
        raise ValueError(f"{printable(path)} is a file: give the folder it lies in, {printable(path.parent)}")
    if is_run(path) and base is not None:
        raise ValueError(f"{printable(path)} is a run: it knows its own base, so leave the base out")
    if is_run(path):
        return Run.read(path / _last_phase(path) if (path / "recipe.json").exists() else path)
    if (path / CONFIG).exists() or factor_files(path):
        model = None if base is None else PretrainedWeights(base)
        return AdapterRun(_open_folder(path, model), model)
    raise ValueError(f"{printable(path)} holds neither a run nor an adapter{_hint(path)}")


def is_run(path: str | Path) -> bool:
    """Was what lies in a folder trained here, or recorded?"""
    return any((Path(os.path.expanduser(path)) / mark).exists() for mark in MARKS[:2])


def _open_folder(path: Path, base: PretrainedWeights | None) -> AdapterFiles:
    config, files = open_adapter(path)
    kind = config.get("peft_type", "LORA").upper()
    if kind == "FOURIERFT":
        return read_fourier(path, config, files, base)
    if config.get("use_dora"):
        return read_dora(path, config, files, base)
    if kind == "ADALORA":
        return read_adalora(path, config, files)
    if has_heads(name for file in files for name in file):
        return read_hydra(path, config, files)
    read = read_loralib if not config or "enable_lora" in config else read_adapter
    return read(path, config, files)


class AdapterRun(Run):
    """An adapter that was not trained here: no history and no base model, only what its factors say.

    Parameters
    ----------
    files : AdapterFiles
        The folder; ``meta["source"]`` is its path. Its factors are read one layer at a time, when asked for.
    base : Pretrained, optional
        Weights of the base.
    """

    def __init__(self, files: AdapterFiles, base: PretrainedWeights | None = None) -> None:
        self.files, self.base = files, base
        if base is not None and not any(map(base.has_weight, files.parts)):
            raise ValueError(
                f"{printable(base.folder)} holds no weight of any module of {printable(files.path)}: it is not its base"
            )
        ranks = {module: part.rank for module, part in files.parts.items()}
        config = files.config
        meta = {
            "source": str(files.path),
            "label": files.path.resolve().name,
            "method": config | {"name": files.kind.lower()},
            "recipe": {"source": str(files.path.resolve())},
            "model": config.get("base_model_name_or_path") or "unknown",
            "task": None,
            "settings": {},
            "seed": None,
            "status": "not trained here",
            "parents": [],
            "checksums": {},
            "states": {"last": {"step": None, "ranks": ranks}},
            "test": {},
            "parameters": {"trained": sum(part.size for part in files.parts.values())},
            "modules": [_module_row(module, *part.shape) for module, part in files.parts.items()],
        }
        super().__init__(files.path, meta)

    @property
    def needs_base(self) -> bool:
        """Can it be opened only with the folder of its base?"""
        return self.files.kind == "FourierFT" and named_base(self.files.config) is None

    @cached_property
    def id(self) -> str:
        """The first twelve hex digits of the hash over configuration and weights."""
        digest = hashlib.sha256(json.dumps(self.files.config, sort_keys=True).encode())
        for file in self.files.files:
            with file.path.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()[:12]

    @cached_property
    def spectra(self) -> dict[str, np.ndarray]:
        """Singular values of every module's update, largest first; NaN where a factor holds NaN.

        Of FourierFT they are asked for here alone: norms do not need them, and they take long.
        """
        return dict(spectra_by_layer(self))

    @cached_property
    def table(self) -> pd.DataFrame:
        """Norm and ranks of every module at no step (NA); NaN is what needs the base's weights, or long spectra."""
        rows = []
        for module, rank in self.ranks().items():
            values = {"rank": float(rank)} | self._measures[module]
            rows += [(-1, Record(quantity, value, module)) for quantity, value in values.items()]
        return records.frame(self.id, rows, self.modules)

    @cached_property
    def _measures(self) -> dict[str, dict[str, float]]:
        return {module: self._measure_module(module) for module in self.files.parts}

    def _measure_module(self, module: str) -> dict[str, float]:
        part = self.files.parts[module]
        if part.has_thin_factors:
            sigma = self.spectra[module]
            norm, stable, effective = root_of_squares(sigma), stable_rank(sigma), effective_rank(sigma)
        else:
            norm, stable, effective = part.update().norm(), np.nan, np.nan
        values = {"update_norm": norm, "stable_rank": stable, "effective_rank": effective}
        if self.base is None or not self.base.has_weight(module):
            return values | {"weight_norm": np.nan, "relative_update": np.nan}
        W0 = self.base.weight(module, part.shape, part.transposed)
        start = Dense(W0).norm()
        relative = norm / start if start else np.inf
        return values | {"weight_norm": weight_norm(W0, part.update()), "relative_update": relative}

    def factors(self, step: int | None = None, state: str = "last") -> Mapping[str, dict[str, np.ndarray]]:
        """``{"A": (rank, in), "B": (out, rank)}`` of every module, read when asked for; see ``factor_formats``."""
        self._require_last_state(step, state)
        parts = self.files.parts
        return Lazy(list(parts), lambda module: parts[module].factors())

    def updates(self, step: int | None = None, state: str = "last") -> Mapping[str, LowRank | Dense]:
        """The update of every module, read when asked for."""
        self._require_last_state(step, state)
        return Lazy(list(self.files.parts), lambda module: self.files.parts[module].update())

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        """Modules whose factors stand for an update that depends on the input, by what the headers say."""
        self._require_last_state(None, state)
        return {module for module, part in self.files.parts.items() if not part.exact}

    def snapshot(self, name: str, step: int | None = None) -> pd.DataFrame:
        """Raise a ValueError: only training keeps snapshots."""
        raise ValueError(f"{self.label} was not trained here and has no snapshots: its factors are in run.factors()")

    def summary(self, all: bool = False, state: str = "last") -> pd.DataFrame:
        """One row an adapted module: place, rank, norm of the update and its ranks."""
        self._require_last_state(None, state)
        frame = self.modules[["module", "stack", "layer", "role"]]
        frame = frame.assign(rank=pd.array(list(self.ranks().values()), dtype="Int64"))
        measured = pd.DataFrame(list(self._measures.values()))
        return frame.join(measured.reindex(columns=list(SUMMARY)).astype("float64")).assign(
            exact=[part.exact for part in self.files.parts.values()]
        )

    def restore(self, model: Any, state: str = "last", method: Any = None) -> None:
        """Raise a ValueError: PEFT loads its own adapters."""
        raise ValueError(f"{self.label} was not trained here: PeftModel.from_pretrained(model, {str(self.path)!r})")

    def save(self, path: str | Path) -> Run:
        """Raise a ValueError: the folder itself is all there is."""
        raise ValueError(f"{self.label} was not trained here: copy its folder, {self.path}")

    def _require_last_state(self, step: int | None, state: str) -> None:
        if step is not None or state != "last":
            asked = f"step {step}" if step is not None else f"state {state!r}"
            raise ValueError(f"{self.label} was not trained here: it holds one state, so there is no {asked}")

    def _state(self, state: str) -> dict[str, Any]:
        self._require_last_state(None, state)
        return super()._state(state)

    def _lines(self) -> list[tuple[str, str]]:
        ranks = sorted(set(self.ranks().values()))
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        count = len(self.files.parts)
        return [
            ("adapter", f"{self.label}  {self.files.kind}, {rank}"),
            ("base", str(self.meta["model"])),
            ("holds", f"{count} modules, {self.meta['parameters']['trained']:,} parameters"),
            ("folder", str(self.path)),
            *largest_lines(self),
        ]


def spectra_by_layer(run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """Singular values of all updates, with the factors of one layer in memory."""
    layers = defaultdict(list)
    updates = run.updates()
    for module in updates:
        stack, layer, _ = parse(module)
        layers[module if layer is None else (stack, layer)].append(module)
    for names in layers.values():
        for batch in _update_batches(updates, names):
            yield from zip(batch, spectra(list(batch.values())), strict=True)


def _update_batches(
    updates: Mapping[str, LowRank | Dense], names: Iterable[str]
) -> Iterator[dict[str, LowRank | Dense]]:
    """Updates read in groups of limited size: a layer may have any number of modules."""
    batch: dict[str, LowRank | Dense] = {}
    size = 0
    for name in names:
        batch[name] = update = updates[name]
        size += update.A.size + update.B.size if isinstance(update, LowRank) else 0
        if size > _BATCH:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _module_row(module: str, outer: int, inner: int) -> dict[str, Any]:
    stack, layer, role = parse(module)
    return {
        "module": module, "stack": stack, "layer": layer, "role": role,
        "out_features": outer, "in_features": inner, "tied": "",
    }  # fmt: skip


def _last_phase(path: Path) -> str:
    file = path / "recipe.json"
    recipe = read_json(file, Recipe)
    last = recipe.phases[-1]
    if not is_plain(last):
        raise ValueError(f"cannot read {printable(file)}: a phase must be a folder below it, got {printable(last)!r}")
    if recipe.status != "done":
        raise ValueError(
            f"{printable(path)} is {recipe.status}, in its phase {printable(last)}: "
            "the same call of train goes on with it"
        )
    return last


def _hint(path: Path) -> str:
    """What lies there instead."""
    inside = sorted(child.name for child in path.iterdir() if any((child / mark).exists() for mark in MARKS))
    if inside:
        return f" itself, but {len(inside)} below it: give {printable(path / inside[-1])}"
    if (path / "config.json").exists():
        return ": it looks like a whole model, of which `lorascope inspect --base DIR` tells what turned in it"
    refuse_pickles(path.iterdir())
    return f": there is none of {', '.join(MARKS)}"
