"""PEFT's LoRA folders, read as files: which modules they adapt, by which factors, at which scale.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, which may be split into shards. The headers
alone tell names and shapes; a factor is read when its update is asked for. Other layouts have files of their own beside
this one, and share its parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import FLOATS, TensorFile, open_tensors, refuse_pickles, weight_files
from lorascope.files.typed_json import Finite, Positive, read_json, to_typed
from lorascope.runs.formats.stored_update import StoredLoRA, StoredTensor, StoredUpdate
from lorascope.runs.manifest import Allocation
from lorascope.schema.module_roles import parse, position
from lorascope.schema.name_patterns import Patterns

CONFIG = "adapter_config.json"
STEM = "adapter_model"
WEIGHTS = f"{STEM}.safetensors"
PREFIX = "base_model.model."
# The adapter's own name may stand behind the factor's, where a state dict was saved by hand.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>A|B|E|magnitude_vector)(?:\.(?!bias$|weight$)[^.]+)?(?:\.weight)?",
    re.DOTALL,  # a name may hold a line break
)
_KINDS = ("LORA", "ADALORA", "FOURIERFT")
# A side of the largest table has 300,000 rows, its factor of rank 256 75 million values: more is no adapter, and would
# take more memory than there is.
MAX_SIDE, MAX_VALUES = 2**24, 2**28
_VARIANTS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
}


@dataclass(frozen=True)
class _CommonConfig(Allocation):
    """What counts of the configuration of any kind."""

    peft_type: str = field(kw_only=True)
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    lora_alpha: Finite = 8
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None


@dataclass(frozen=True)
class LoraConfig:
    """What counts here of ``adapter_config.json`` of LoRA and DoRA, with PEFT's defaults."""

    r: Positive = 8
    lora_alpha: Finite = 8
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, Finite] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    target_parameters: str | list[str] | None = None


class LoraSettings:
    """Rank and alpha of each module.

    Parameters
    ----------
    path : path
        The folder.
    config : dict
        Its ``adapter_config.json``.

    Raises
    ------
    ValueError
        A setting has another type, or a key of a pattern is not a regular expression.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        file = path / CONFIG
        self.config = to_typed(config, LoraConfig, file)
        self._ranks, self._alphas = self.config.rank_pattern or {}, self.config.alpha_pattern or {}
        self._rank_keys = Patterns(self._ranks, f"rank_pattern of {file}")
        self._alpha_keys = Patterns(self._alphas, f"alpha_pattern of {file}")

    def rank(self, module: str) -> int:
        """Return the rank of a module."""
        key = self._rank_keys.first(module)
        return self.config.r if key is None else self._ranks[key]

    def scale(self, module: str) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) of a rank-stabilized adapter."""
        key, rank = self._alpha_keys.first(module), self.rank(module)
        alpha = self.config.lora_alpha if key is None else self._alphas[key]
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


@dataclass(frozen=True)
class AdapterFiles:
    """A PEFT folder.

    Parameters
    ----------
    path : path
    config : dict
        ``adapter_config.json``; empty where there is none.
    parts : mapping module name -> Kept
        In the order of the axes: by layer, then by role.
    others : tuple of str
        Names of the tensors that belong to no factor: heads, biases, whole embeddings.
    files : tuple of TensorFile
    kind : str
        Name of the method.
    """

    path: Path
    config: dict[str, Any]
    parts: Mapping[str, StoredUpdate]
    others: tuple[str, ...]
    files: tuple[TensorFile, ...]
    kind: str = "LoRA"

    def whole(self, module: str) -> np.ndarray:
        """The weight of a module that is stored as it is, with two dimensions."""
        wanted = {f"{module}{layer}.weight" for layer in ("", ".base_layer")}
        file, name = next((file, name) for file in self.files for name in file if name.removeprefix(PREFIX) in wanted)
        return StoredTensor(file, name).read()


def open_adapter(path: Path) -> tuple[dict[str, Any], tuple[TensorFile, ...]]:
    """The configuration of an adapter's folder, and its files of weights.

    Raises
    ------
    FileNotFoundError
        There are no weights.
    ValueError
        It is another kind of adapter, or a file cannot be read.
    """
    config = _read_config(path) if (path / CONFIG).exists() else {}
    return config, tuple(open_tensors(file) for file in _weight_files(path))


def factor_files(path: Path) -> list[Path]:
    """Files of weights in a folder that hold factors, whatever their names."""
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    return [file for file in files if any(".lora_" in name for name in open_tensors(file))]


def group_factors(
    files: Iterable[TensorFile], pattern: re.Pattern[str]
) -> tuple[dict[str, dict[str, StoredTensor]], tuple[str, ...]]:
    """Factors of every module by their names, in the order of the axes, and the names of all other tensors.

    Parameters
    ----------
    files : iterable of TensorFile
    pattern : pattern
        Of names without PEFT's prefix, with the groups ``module`` and ``factor``.

    Raises
    ------
    ValueError
        A factor is stored as anything but floats, or is no matrix of an adapter.
    """
    found: dict[str, dict[str, StoredTensor]] = {}
    others = []
    for file in files:
        for name in file:
            match = pattern.fullmatch(name.removeprefix(PREFIX))
            if match is None:
                others.append(name.removeprefix(PREFIX))
            else:
                found.setdefault(match["module"], {})[match["factor"]] = _float_factor(file, name)
    ordered = sorted(found, key=lambda module: position(*parse(module)))
    return {module: found[module] for module in ordered}, tuple(others)


def lora_factors(
    path: Path, files: Iterable[TensorFile], wanted: Sequence[str]
) -> tuple[dict[str, dict[str, StoredTensor]], tuple[str, ...]]:
    """``group_factors`` by the names of LoRA's factors, every module with exactly those wanted.

    Raises
    ------
    ValueError
        A module lacks one of them or has another, or there are none at all.
    """
    found, others = group_factors(files, _FACTOR)
    foreign = next((name for name in others if re.search(r"\.lora_(?!B\.bias$)", name)), None)
    if foreign is not None:
        raise ValueError(f"{printable(path)} is a variant of LoRA that is not read yet: it holds {printable(foreign)}")
    if not found:
        held = f"such as {others[0]}" if others else "no tensor at all"
        raise ValueError(f"{printable(path)} says LORA but its weights hold no lora_A and lora_B: {printable(held)}")
    for module, factors in found.items():
        lacking = next((name for name in wanted if name not in factors), None)
        if lacking is not None:
            held = " and ".join(f"lora_{name}" for name in factors)
            raise ValueError(
                f"{printable(path)}: {printable(module)} has {held} but no lora_{lacking}: a part is missing"
            )
        extra = next((name for name in factors if name not in wanted), None)
        if extra is not None:
            option = {"magnitude_vector": "use_dora", "E": "ADALORA"}[extra]
            raise ValueError(
                f"{printable(path)}: {printable(module)} holds lora_{extra}, but {CONFIG} does not say {option}"
            )
    return found, others


def read_adapter(path: Path, config: dict[str, Any], files: tuple[TensorFile, ...]) -> AdapterFiles:
    """The modules of an opened folder of LoRA.

    Raises
    ------
    ValueError
        It holds a variant of LoRA, or configuration and weights do not fit together.
    """
    found, others = lora_factors(path, files, ("A", "B"))
    settings = LoraSettings(path, config)
    parts = {module: StoredLoRA(*lora_part(path, module, factors, settings)) for module, factors in found.items()}
    return AdapterFiles(path, config, parts, others, files)


def lora_part(
    path: Path, module: str, factors: Mapping[str, StoredTensor], settings: LoraSettings
) -> tuple[StoredTensor, StoredTensor, float, bool]:
    """B, A, scale and orientation of one module.

    Raises
    ------
    ValueError
        Its factors have another rank than the configuration says.
    """
    A, B, config = factors["A"], factors["B"], settings.config
    check_rank(path, module, factors, settings.rank(module), bool(config.target_parameters))
    return B, A, settings.scale(module), is_transposed(A, config.fan_in_fan_out)


def check_rank(path: Path, module: str, factors: Mapping[str, StoredTensor], rank: int, experts: bool = False) -> None:
    """Raise a ValueError where factors have another rank than the configuration says."""
    held = factors["A"].shape[0], factors["B"].shape[1]
    if held != (rank, rank):
        why = "; experts in one tensor (target_parameters) are not read" if experts else ""
        raise ValueError(
            f"{printable(path)}: {CONFIG} gives {printable(module)} rank {rank}, "
            f"its factors have {held[0]} and {held[1]}{why}"
        )


def is_transposed(A: StoredTensor, fan_in_fan_out: bool | None) -> bool:
    """Does the base store the weight as (in, out)? Tables of embeddings are."""
    return bool(fan_in_fan_out) or ".lora_embedding_" in A.name


def _float_factor(file: TensorFile, name: str) -> StoredTensor:
    """A stored factor; a ValueError where it is stored as anything but floats, or has the shape of none."""
    if file.dtype(name) not in FLOATS:
        raise ValueError(
            f"{printable(file.path)}: {printable(name)} is stored as {printable(file.dtype(name))}; "
            "only floats are read"
        )
    shape = file.shape(name)
    if not shape or max(shape) > MAX_SIDE or math.prod(shape) > MAX_VALUES:
        raise ValueError(
            f"{printable(file.path)}: {printable(name)} must have 1 or more dimensions of at most {MAX_SIDE} and at "
            f"most {MAX_VALUES} values, got the shape {shape}"
        )
    return StoredTensor(file, name)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    config = read_json(file, dict[str, Any])
    kind = to_typed(config, _CommonConfig, file).peft_type.upper()
    kind = next((name for key, name in _VARIANTS.items() if config.get(key)), kind)
    if kind not in _KINDS:
        raise ValueError(
            f"{printable(path)} holds an adapter of type {printable(kind)}, which is not read yet: "
            f"{', '.join(_KINDS)} are"
        )
    return config


def _weight_files(path: Path) -> list[Path]:
    files = weight_files(path, STEM) or factor_files(path)
    if not files:
        refuse_pickles(path.glob(f"*{STEM}*"))
        raise FileNotFoundError(f"{printable(path)} has {CONFIG} but no {WEIGHTS}")
    return files
