"""Loading of run folders, and of adapters that were trained elsewhere."""

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
from lorascope.files.safetensors_io import is_plain, reject_pickles
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

# Maximum number of factor values in memory at once; a layer of a large model has 10 million at rank 64.
_BATCH = 2**26
MARKS = ("recipe.json", "run.json", CONFIG)


def load(path: str | Path, base: str | Path | None = None) -> Run:
    """Open a folder as a Run.

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
    if (path / CONFIG).exists() or factor_files(path):
        model = None if base is None else PretrainedWeights(base)
        return AdapterRun(_open_folder(path, model), model)
    raise ValueError(f"cannot load {printable(path)}: it is neither a run nor an adapter{_hint(path)}")


def is_run(path: str | Path) -> bool:
    """Return whether a folder is a run that lorascope trained or recorded."""
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
    """Adapter that was trained elsewhere: its factors, without a training history.

    Parameters
    ----------
    files : AdapterFiles
        The opened folder; ``meta["source"]`` is its path. Factors are loaded on access, one layer at a time.
    base : PretrainedWeights, optional
        Weights of the base model.
    """

    def __init__(self, files: AdapterFiles, base: PretrainedWeights | None = None) -> None:
        self.files, self.base = files, base
        if base is not None and not any(map(base.has_weight, files.parts)):
            raise ValueError(
                f"cannot use {printable(base.folder)} as the base of {printable(files.path)}: "
                "it has no weight of any adapted module"
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
        """Return whether the adapter can be opened only with the folder of its base."""
        return self.files.kind == "FourierFT" and named_base(self.files.config) is None

    @cached_property
    def id(self) -> str:
        """First twelve hex digits of the SHA-256 of configuration and weights."""
        digest = hashlib.sha256(json.dumps(self.files.config, sort_keys=True).encode())
        for file in self.files.files:
            with file.path.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()[:12]

    @cached_property
    def spectra(self) -> dict[str, np.ndarray]:
        """Singular values of every module's update, largest first; NaN if a factor contains NaN.

        Those of FourierFT are slow and are computed only here, because its norms do not require them.
        """
        return dict(spectra_by_layer(self))

    @cached_property
    def table(self) -> pd.DataFrame:
        """Norms and ranks of every module, with step NA; NaN if they require base weights or slow spectra."""
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
        """Return ``{"A": (rank, in), "B": (out, rank)}`` per module, loaded on access; see ``factor_formats``."""
        self._require_last_state(step, state)
        parts = self.files.parts
        return Lazy(list(parts), lambda module: parts[module].factors())

    def updates(self, step: int | None = None, state: str = "last") -> Mapping[str, LowRank | Dense]:
        """Return the update of every module, loaded on access."""
        self._require_last_state(step, state)
        return Lazy(list(self.files.parts), lambda module: self.files.parts[module].update())

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        """Return the modules whose update depends on the input, from the file headers."""
        self._require_last_state(None, state)
        return {module for module, part in self.files.parts.items() if not part.exact}

    def snapshot(self, name: str, step: int | None = None) -> pd.DataFrame:
        """Raise a ValueError: an adapter has no snapshots."""
        raise ValueError(f"cannot read snapshots of adapter {self.label!r}: use run.factors() instead")

    def summary(self, all: bool = False, state: str = "last") -> pd.DataFrame:
        """Return one row per adapted module: position, rank, norms, stable and effective rank."""
        self._require_last_state(None, state)
        frame = self.modules[["module", "stack", "layer", "role"]]
        frame = frame.assign(rank=pd.array(list(self.ranks().values()), dtype="Int64"))
        measured = pd.DataFrame(list(self._measures.values()))
        return frame.join(measured.reindex(columns=list(SUMMARY)).astype("float64")).assign(
            exact=[part.exact for part in self.files.parts.values()]
        )

    def restore(self, model: Any, state: str = "last", method: Any = None) -> None:
        """Raise a ValueError: PEFT loads its own adapters."""
        raise ValueError(
            f"cannot restore adapter {self.label!r}: use PeftModel.from_pretrained(model, {str(self.path)!r}) instead"
        )

    def save(self, path: str | Path) -> Run:
        """Raise a ValueError: the adapter folder can be copied."""
        raise ValueError(f"cannot save adapter {self.label!r} as a run: copy its folder {self.path} instead")

    def _require_last_state(self, step: int | None, state: str) -> None:
        if step is not None or state != "last":
            requested = f"step {step}" if step is not None else f"state {state!r}"
            raise ValueError(f"cannot read {requested} of adapter {self.label!r}: it has only the state 'last'")

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
            ("size", f"{count} modules, {self.meta['parameters']['trained']:,} parameters"),
            ("folder", str(self.path)),
            *largest_lines(self),
        ]


def spectra_by_layer(run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the singular values of all updates, with the factors of one layer in memory."""
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
    """Yield updates in batches of limited size, because a layer may have any number of modules."""
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
        raise ValueError(f"cannot read {printable(file)}: a phase must be a folder next to it, got {printable(last)!r}")
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
