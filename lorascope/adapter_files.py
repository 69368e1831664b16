"""PEFT's LoRA folders, read as files: which modules they adapt, by which factors, at which scale.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, which may be split into shards. The headers
alone tell names and shapes; a factor is read when its update is asked for. Other layouts have files of their own beside
this one, and share its parts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.adapter_parts import Factor, Kept, Part
from lorascope.roles import parse, position
from lorascope.tensors import FLOATS, TensorFile, open_tensors, refuse_pickles, weight_files

CONFIG = "adapter_config.json"
STEM = "adapter_model"
WEIGHTS = f"{STEM}.safetensors"
PREFIX = "base_model.model."
# The adapter's own name may stand behind the factor's, where a state dict was saved by hand.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>A|B|E|magnitude_vector)(?:\.(?!bias$|weight$)[^.]+)?(?:\.weight)?"
)
_KINDS = ("LORA", "ADALORA", "FOURIERFT")
_VARIANTS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
}


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
    parts: Mapping[str, Kept]
    others: tuple[str, ...]
    files: tuple[TensorFile, ...]
    kind: str = "LoRA"

    def whole(self, module: str) -> np.ndarray:
        """The weight of a module that is stored as it is, with two dimensions."""
        wanted = {f"{module}{layer}.weight" for layer in ("", ".base_layer")}
        file, name = next((file, name) for file in self.files for name in file if name.removeprefix(PREFIX) in wanted)
        return file[name].reshape(file.shape(name)[0], -1)


def open_adapter(path: Path) -> tuple[dict[str, Any], tuple[TensorFile, ...]]:
    """The configuration of an adapter's folder, and its files of weights.

    Raises
    ------
    FileNotFoundError
        There are no weights.
    ValueError
        It is another kind of adapter, or a file cannot be read.
    """
    config = _config(path) if (path / CONFIG).exists() else {}
    return config, tuple(open_tensors(file) for file in _weight_files(path))


def factor_files(path: Path) -> list[Path]:
    """Files of weights in a folder that hold factors, whatever their names."""
    return [file for file in sorted(path.glob("*.safetensors")) if any(".lora_" in name for name in open_tensors(file))]


def grouped(
    files: Iterable[TensorFile], pattern: re.Pattern[str]
) -> tuple[dict[str, dict[str, Factor]], tuple[str, ...]]:
    """Factors of every module by their names, in the order of the axes, and the names of all other tensors.

    Parameters
    ----------
    files : iterable of TensorFile
    pattern : pattern
        Of names without PEFT's prefix, with the groups ``module`` and ``factor``.

    Raises
    ------
    ValueError
        A factor is stored as anything but floats.
    """
    found: dict[str, dict[str, Factor]] = {}
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
) -> tuple[dict[str, dict[str, Factor]], tuple[str, ...]]:
    """``grouped`` by the names of LoRA's factors, every module with exactly those wanted.

    Raises
    ------
    ValueError
        A module lacks one of them or has another, or there are none at all.
    """
    found, others = grouped(files, _FACTOR)
    foreign = next((name for name in others if re.search(r"\.lora_(?!B\.bias$)", name)), None)
    if foreign is not None:
        raise ValueError(f"{path} is a variant of LoRA that is not read yet: it holds {foreign}")
    if not found:
        held = f"such as {others[0]}" if others else "no tensor at all"
        raise ValueError(f"{path} says LORA but its weights hold no lora_A and lora_B: {held}")
    for module, factors in found.items():
        lacking = next((name for name in wanted if name not in factors), None)
        if lacking is not None:
            held = " and ".join(f"lora_{name}" for name in factors)
            raise ValueError(f"{path}: {module} has {held} but no lora_{lacking}: a part is missing")
        extra = next((name for name in factors if name not in wanted), None)
        if extra is not None:
            option = {"magnitude_vector": "use_dora", "E": "ADALORA"}[extra]
            raise ValueError(f"{path}: {module} holds lora_{extra}, but {CONFIG} does not say {option}")
    return found, others


def read_adapter(path: Path, config: dict[str, Any], files: tuple[TensorFile, ...]) -> AdapterFiles:
    """The modules of an opened folder of LoRA.

    Raises
    ------
    ValueError
        It holds a variant of LoRA, or configuration and weights do not fit together.
    """
    found, others = lora_factors(path, files, ("A", "B"))
    parts = {module: Part(*lora_part(path, module, factors, config)) for module, factors in found.items()}
    return AdapterFiles(path, config, parts, others, files)


def lora_part(
    path: Path, module: str, factors: Mapping[str, Factor], config: Mapping[str, Any]
) -> tuple[Factor, Factor, float, bool]:
    """B, A, scale and orientation of one module.

    Raises
    ------
    ValueError
        Its factors have another rank than the configuration says.
    """
    rank = _setting(config, "rank_pattern", module, "r", 8)
    alpha = _setting(config, "alpha_pattern", module, "lora_alpha", 8)
    check_rank(path, module, factors, rank, config)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return factors["B"], factors["A"], scale, is_transposed(factors["A"], config)


def check_rank(path: Path, module: str, factors: Mapping[str, Factor], rank: int, config: Mapping[str, Any]) -> None:
    """Raise a ValueError where factors have another rank than the configuration says."""
    held = factors["A"].shape[0], factors["B"].shape[1]
    if held != (rank, rank):
        why = "; experts in one tensor (target_parameters) are not read" if config.get("target_parameters") else ""
        raise ValueError(f"{path}: {CONFIG} gives {module} rank {rank}, its factors have {held[0]} and {held[1]}{why}")


def is_transposed(A: Factor, config: Mapping[str, Any]) -> bool:
    """Does the base store the weight as (in, out)? Tables of embeddings are."""
    return bool(config.get("fan_in_fan_out")) or ".lora_embedding_" in A.name


def _float_factor(file: TensorFile, name: str) -> Factor:
    """A stored factor; a ValueError where it is stored as anything but floats."""
    if file.dtype(name) not in FLOATS:
        raise ValueError(f"{file.path}: {name} is stored as {file.dtype(name)}; only floats are read")
    return Factor(file, name)


def pattern_key(patterns: Iterable[str], module: str) -> str | None:
    """The entry of a ``rank_pattern`` or ``alpha_pattern`` that is about a module: the first that fits, as in PEFT."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


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
    if kind not in _KINDS:
        raise ValueError(f"{path} holds an adapter of type {kind}, which is not read yet: {', '.join(_KINDS)} are")
    _check(file, config, masks=kind == "ADALORA")
    return config


def _check(file: Path, config: Mapping[str, Any], masks: bool) -> None:
    """Raise a ValueError where a setting that counts here is of a kind that it cannot be.

    ``masks``: does ``rank_pattern`` say which components a module keeps, as AdaLoRA's does, and not how many?
    """
    for name in ("r", "init_r", "lora_alpha"):
        if not isinstance(config.get(name, 1), int | float):
            raise ValueError(f"{file}: {name} is {config[name]!r}, where a number belongs")
    for name in ("rank_pattern", "alpha_pattern", "n_frequency_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{file}: {name} is {patterns!r}, where names of modules with their numbers belong")
        masked = masks and name == "rank_pattern"
        for key, value in patterns.items():
            if not (_is_mask(value) if masked else isinstance(value, int | float)):
                wanted = "a list of true and false" if masked else "a number"
                raise ValueError(f"{file}: {name} gives {key!r} {value!r}, where {wanted} belongs")
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{file}: {name} names {key!r}, which is no regular expression: {error}") from error
    if not isinstance(config.get("enable_lora") or [], list):
        raise ValueError(f"{file}: enable_lora is {config['enable_lora']!r}, where a list of true and false belongs")


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(kept, bool) for kept in value)


def _weight_files(path: Path) -> list[Path]:
    files = weight_files(path, STEM) or factor_files(path)
    if not files:
        refuse_pickles(path.glob(f"*{STEM}*"))
        raise FileNotFoundError(f"{path} has {CONFIG} but no {WEIGHTS}")
    return files
