"""PEFT's LoRA folders, read as files: which modules they adapt, by which factors, at which scale.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, which may be split into shards. The headers
alone tell names and shapes; a factor is read when its update is asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lorascope.fourier import Fourier
from lorascope.roles import parse, position
from lorascope.tensors import FLOATS, TensorFile, open_tensors, refuse_pickles, weight_files
from lorascope.update import LowRank

CONFIG = "adapter_config.json"
STEM = "adapter_model"
WEIGHTS = f"{STEM}.safetensors"
PREFIX = "base_model.model."
# The adapter's own name may stand behind the factor's, where a state dict was saved by hand.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.(?!bias$|weight$)[^.]+)?(?:\.weight)?")
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
}


@dataclass(frozen=True)
class Factor:
    """One stored factor.

    Parameters
    ----------
    file : TensorFile
    name : str
        Its name in the file.
    """

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """Two dimensions; what a convolution adds is folded into the second."""
        first, *rest = self.file.shape(self.name)
        return first, math.prod(rest)

    def read(self) -> Any:
        """The array, with the two dimensions of ``shape``."""
        return self.file[self.name].reshape(self.shape)


class Kept:
    """What a folder keeps of one module, whatever the method: known by the headers, the arrays read when asked for."""

    scale: float
    transposed: bool
    """Does the base store its weight as (in, out)?"""
    thin: ClassVar[bool] = True
    """Are singular values found from thin factors, and so at once?"""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Number of components."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of stored values."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        """Stored dtype, such as ``"BF16"``."""
        raise NotImplementedError

    @property
    def exact(self) -> bool:
        """Does ``update`` say all of it, whatever the input?"""
        return True

    def factors(self) -> dict[str, Any]:
        """Read the factors."""
        raise NotImplementedError

    def update(self) -> LowRank | Fourier:
        """Read the factors, as an update."""
        raise NotImplementedError


@dataclass(frozen=True)
class Part(Kept):
    """The update of one module: scale * B @ A.

    Parameters
    ----------
    B, A : Factor
        (out, rank) and (rank, in), whatever way round the base stores its weight.
    scale : float
    transposed : bool
        Does the base store its weight as (in, out)?
    """

    B: Factor
    A: Factor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.A.shape[0]

    @property
    def size(self) -> int:
        """Number of stored values."""
        return math.prod(self.A.shape) + math.prod(self.B.shape)

    @property
    def dtype(self) -> str:
        """Stored dtype, such as ``"BF16"``."""
        return self.A.file.dtype(self.A.name)

    def factors(self) -> dict[str, Any]:
        """Read the factors."""
        return {"A": self.A.read(), "B": self.B.read()}

    def update(self) -> LowRank:
        """Read the factors."""
        return LowRank(self.B.read(), self.A.read(), self.scale)


@dataclass(frozen=True)
class AdapterFiles:
    """A PEFT folder.

    Parameters
    ----------
    path : path
    config : dict
        ``adapter_config.json``.
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
    parts: Mapping[str, Kept]
    others: tuple[str, ...]
    files: tuple[TensorFile, ...]
    kind: str = "LoRA"


def open_adapter(path: Path) -> tuple[dict[str, Any], tuple[TensorFile, ...]]:
    """The configuration of a PEFT folder, and its files of weights.

    Raises
    ------
    FileNotFoundError
        There are no weights.
    ValueError
        It is another kind of adapter, or a file cannot be read.
    """
    config = _config(path)
    return config, tuple(open_tensors(file) for file in _weight_files(path))


def read_adapter(path: Path, config: dict[str, Any], files: tuple[TensorFile, ...]) -> AdapterFiles:
    """The modules of an opened folder.

    Raises
    ------
    ValueError
        It holds a variant of LoRA, or configuration and weights do not fit together.
    """
    found: dict[str, dict[str, Factor]] = {}
    others = []
    for file in files:
        for name in file:
            match = _FACTOR.fullmatch(name)
            if match is None:
                others.append(name.removeprefix(PREFIX))
                continue
            found.setdefault(match["module"].removeprefix(PREFIX), {})[match["factor"]] = float_factor(file, name)
    foreign = next((name for name in others if re.search(r"\.lora_(?!B\.bias$)", name)), None)
    if foreign is not None:
        raise ValueError(f"{path} is a variant of LoRA that is not read yet: it holds {foreign}")
    if not found:
        held = f"such as {others[0]}" if others else "no tensor at all"
        raise ValueError(f"{path} says LORA but its weights hold no lora_A and lora_B: {held}")
    ordered = sorted(found, key=lambda module: position(*parse(module)))
    parts = {module: _part(path, module, found[module], config) for module in ordered}
    return AdapterFiles(path, config, parts, tuple(others), files)


def float_factor(file: TensorFile, name: str) -> Factor:
    """A stored factor; a ValueError where it is stored as anything but floats."""
    if file.dtype(name) not in FLOATS:
        raise ValueError(f"{file.path}: {name} is stored as {file.dtype(name)}; only floats are read")
    return Factor(file, name)


def pattern_key(patterns: Iterable[str], module: str) -> str | None:
    """The entry of a ``rank_pattern`` or ``alpha_pattern`` that is about a module: the first that fits, as in PEFT."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


def _part(path: Path, module: str, factors: Mapping[str, Factor], config: Mapping[str, Any]) -> Part:
    if factors.keys() != {"A", "B"}:
        only = next(iter(factors))
        raise ValueError(f"{path}: {module} has lora_{only} but no lora_{'A' if only == 'B' else 'B'}: half is missing")
    rank = _setting(config, "rank_pattern", module, "r", 8)
    alpha = _setting(config, "alpha_pattern", module, "lora_alpha", 8)
    held = factors["A"].shape[0], factors["B"].shape[1]
    if held != (rank, rank):
        why = "; experts in one tensor (target_parameters) are not read" if config.get("target_parameters") else ""
        raise ValueError(f"{path}: {CONFIG} gives {module} rank {rank}, its factors have {held[0]} and {held[1]}{why}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = bool(config.get("fan_in_fan_out")) or ".lora_embedding_" in factors["A"].name
    return Part(factors["B"], factors["A"], scale, transposed)


def _setting(config: Mapping[str, Any], pattern: str, module: str, default: str, otherwise: int) -> Any:
    patterns = config.get(pattern) or {}
    key = pattern_key(patterns, module)
    return config.get(default, otherwise) if key is None else patterns[key]


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = str(config["peft_type"]).upper()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not readable as PEFT's configuration of an adapter: {error}") from error
    kind = next((name for key, name in _VARIANTS.items() if config.get(key)), kind)
    if kind not in ("LORA", "FOURIERFT"):
        raise ValueError(f"{path} holds an adapter of type {kind}, which is not read yet: LORA and FOURIERFT are")
    return config


def _weight_files(path: Path) -> list[Path]:
    files = weight_files(path, STEM)
    if not files:
        refuse_pickles(path, STEM)
        raise FileNotFoundError(f"{path} has {CONFIG} but no {WEIGHTS}")
    return files
