"""Reader of PEFT LoRA folders: adapted modules, factors and scales.

A folder contains ``adapter_config.json`` and ``adapter_model.safetensors``, which may be split into shards. Names and
shapes are read from the headers; a factor is loaded when its update is accessed. The modules for other formats use the
functions of this one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lorascope.files import hub
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import FLOATS, TensorFile, open_tensors
from lorascope.files.typed_json import Finite, Positive, to_typed, unreadable
from lorascope.formats.peft_config import Allocation
from lorascope.formats.peft_modules import OUT_PROJ, complete_lora, stacked_base
from lorascope.formats.peft_whole_weights import UNUSED
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import PREFIX, AdapterFiles, StoredLoRA, StoredTensor, in_order, stored_tensors
from lorascope.schema.name_patterns import per_module

CONFIG = hub.CONFIG
STEM = "adapter_model"
WEIGHTS = f"{STEM}.safetensors"
# The adapter name may follow that of the factor if a state dict was saved by hand.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>A|B|E|diag|magnitude_vector)(?:\.(?!bias$|weight$)[^.]+)?(?:\.weight)?",
    re.DOTALL,  # a name may contain a line break
)
KINDS = ["LORA", "ADALORA", "FOURIERFT", "VERA"]
"""Types of adapters with an own reader; every `PeftFormat` adds its own."""
# The largest embedding tables have 300,000 rows, so a factor of rank 256 has 75 million values. Larger tensors are not
# factors of an adapter and could exhaust the memory.
MAX_SIDE, MAX_VALUES = 2**24, 2**28
_LORA, _HEAD = re.compile(r"\.lora_"), re.compile(r"\.lora_(?:route|B0)\.")
# The other tensors named lora belong to variants; a trained bias of B does not.
_VARIANT = re.compile(r"\.lora_(?!B\.bias$)")
INDICES = "indices"
"""Part of the names of tensors that contain integers."""
# Indices of SHiRA are stored as floats on Windows.
INDEX_DTYPES = ("I64", "I32", "I16", "U8", "F32")
_VARIANTS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
}


class CommonConfig(Allocation, frozen=True):
    """Settings used from the configuration of LoRA and of every other kind of PEFT adapter."""

    peft_type: str = ""
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    lora_alpha: Finite | None = 8
    alpha: Finite | None = None
    randlora_alpha: Finite | None = None
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None


class LoraConfig(msgspec.Struct, frozen=True):
    """Settings used from PEFT's configuration of LoRA and DoRA, with its defaults."""

    r: Positive = 8
    lora_alpha: Finite = 8
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, Finite] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None


def peft_kind(config: Mapping[str, Any]) -> str:
    """Return the type of a PEFT adapter in capitals, such as LORA, or its variant; "" without a configuration."""
    for setting, variant in _VARIANTS.items():
        if config.get(setting):
            return variant
    return str(config.get("peft_type", "")).upper()


def has_heads(names: Collection[str]) -> bool:
    """Return whether a PEFT LoRA folder has the tensor names of a HydraLoRA."""
    return any(map(_HEAD.search, names))


def factor_files(path: Path) -> list[Path]:
    """Return the safetensors files of a PEFT folder that contain LoRA factors, regardless of their names."""
    files = sorted(filter(Path.is_file, path.glob("*.safetensors")))
    return [file for file in files if any(map(_LORA.search, open_tensors(file)))]


def group_factors(
    files: Iterable[TensorFile], pattern: re.Pattern[str]
) -> tuple[dict[str, dict[str, StoredTensor]], tuple[str, ...]]:
    """Group the factors of a PEFT LoRA by module, ordered by layer and role; also return all other tensor names.

    ``pattern`` matches the names of factors without PEFT's prefix, with the groups ``module`` and ``factor``. A factor
    that is not stored as floats, or as integers if it is named ``indices``, or does not have the shape of one raises a
    ValueError.
    """
    module_factors: dict[str, dict[str, StoredTensor]] = {}
    other_names = []
    for tensor in stored_tensors(files):
        name = tensor.name.removeprefix(PREFIX)
        match = pattern.fullmatch(name)
        if match is None:
            other_names.append(name)
            continue
        require_factor(tensor, INDEX_DTYPES if INDICES in match["factor"] else FLOATS)
        factors = module_factors.setdefault(match["module"], {})
        if match["factor"] in factors:
            names = f"{printable(factors[match['factor']].name)} and {printable(tensor.name)}"
            raise unreadable(tensor.file.path, f"two tensors are the same factor: {names}")
        factors[match["factor"]] = tensor
    return in_order(module_factors), tuple(other_names)


def no_factors(path: Path, must: str, other_names: Sequence[str]) -> ValueError:
    """Return the error for an adapter without LoRA or other factors, which names the first of its other tensors."""
    first = next(iter(other_names), "no tensor")
    return unreadable(path, f"{must}, got {printable(first)}")


def lora_factors(
    path: Path, files: Iterable[TensorFile], expected: Sequence[str]
) -> tuple[dict[str, dict[str, StoredTensor]], tuple[str, ...]]:
    """Group a PEFT LoRA's factors by module; a ValueError reports a module without exactly those in ``expected``."""
    module_factors, other_names = group_factors(files, _FACTOR)
    for name in other_names:
        if _VARIANT.search(name) and not UNUSED.search(name):
            raise unreadable(path, f"variant of LoRA not supported, with {printable(name)}")
    if not module_factors:
        raise no_factors(path, "weights must include lora_A and lora_B", other_names)
    for module, factors in module_factors.items():
        if missing := [name for name in expected if name not in factors]:
            present = " and ".join(f"lora_{name}" for name in factors)
            raise unreadable(path, f"{printable(module)} has {present} but no lora_{missing[0]}")
        if extra := [name for name in factors if name not in expected]:
            option = {"magnitude_vector": "use_dora", "E": "peft_type ADALORA", "diag": "kasa_config"}[extra[0]]
            raise unreadable(path, f"{printable(module)} has lora_{extra[0]}, but {CONFIG} lacks {option}")
    return module_factors, other_names


def is_lora(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Return whether a PEFT adapter is a plain LoRA, with or without experts in one tensor."""
    other = config.get("use_dora") or "enable_lora" in config or has_heads(names)
    return peft_kind(config) == "LORA" and not other


@reads(
    lambda config, names: is_lora(config, names) and not config.get("target_parameters"),
    "LoRA (PEFT), with rsLoRA, patterns, embeddings, convolutions and tied weights",
)
def read_adapter(
    path: Path, config: dict[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of a PEFT LoRA folder."""
    module_factors, other_names = lora_factors(path, files, ("A", "B"))
    base = stacked_base(path, config, module_factors, base)
    return complete_lora(
        AdapterFiles(path, config, lora_parts(path, config, module_factors), other_names, files, base=base)
    )


class RanksAndScales:
    """Rank and scale of each module in a PEFT LoRA folder, from its configuration."""

    def __init__(self, source: object, config: Mapping[str, Any]) -> None:
        self.settings = settings = to_typed(config, LoraConfig, source)
        self._rank_of = per_module(source, "rank_pattern", settings.r, settings.rank_pattern)
        self._alpha_of = per_module(source, "alpha_pattern", settings.lora_alpha, settings.alpha_pattern)

    def rank(self, name: str) -> int:
        """Return the rank of a module or parameter; nn.MultiheadAttention has one rank for its two projections."""
        return self._rank_of(name.removesuffix(OUT_PROJ))

    def scale(self, name: str) -> float:
        """Return the scale of a module or parameter: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        divisor: float = self.rank(name)
        if self.settings.use_rslora:
            divisor = math.sqrt(divisor)
        scale = self._alpha_of(name.removesuffix(OUT_PROJ)) / divisor
        # PEFT 0.21 adds the update of this projection twice, in every forward pass and on merging.
        return 2 * scale if name.endswith(OUT_PROJ) else scale


def lora_parts(
    path: Path, config: Mapping[str, Any], module_factors: Mapping[str, Mapping[str, StoredTensor]]
) -> dict[str, StoredLoRA]:
    """Return the stored updates of a PEFT LoRA, scale * B @ A, with the ranks and scales of its configuration."""
    settings, updates = RanksAndScales(path / CONFIG, config), {}
    for module, factors in module_factors.items():
        check_rank(path, module, factors, settings.rank(module))
        A = factors["A"]
        transposed = is_transposed(A, settings.settings.fan_in_fan_out)
        updates[module] = StoredLoRA(factors["B"], A, settings.scale(module), transposed)
    return updates


def check_rank(path: Path, module: str, factors: Mapping[str, StoredTensor], rank: int) -> None:
    """Raise a ValueError if the rank of a PEFT LoRA's factors differs from its configuration."""
    ranks = factors["A"].shape[0], factors["B"].shape[1]
    if ranks == (0, 0) and rank:  # AdaLoRA may remove all components of a module
        raise unreadable(path, f"{printable(module)} is empty: it was saved under ZeRO-3 or FSDP without gathering")
    if ranks != (rank, rank):
        must = f"factors of {printable(module)} must have rank {rank} ({CONFIG})"
        raise unreadable(path, f"{must}, got {ranks[0]} and {ranks[1]}")


def is_transposed(A: StoredTensor, fan_in_fan_out: bool | None) -> bool:
    """Return whether the base of a PEFT LoRA stores the weight as (in, out), as it does for embeddings."""
    return bool(fan_in_fan_out) or ".lora_embedding_" in A.name


def require_factor(tensor: StoredTensor, dtypes: Sequence[str] = FLOATS) -> StoredTensor:
    """Return a stored LoRA factor; raise a ValueError if its dtype is not that of a factor or it is too large."""
    file, name = tensor.file, tensor.name
    if file.dtype(name) not in dtypes:
        stored = printable(file.dtype(name))
        raise unreadable(file.path, f"{printable(name)} must be stored as one of {', '.join(dtypes)}, got {stored}")
    require_factor_shape(file.path, name, file.shape(name))
    return tensor


def require_factor_shape(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if an array of this shape is too large for a LoRA factor."""
    if not shape or max(shape) > MAX_SIDE or math.prod(shape) > MAX_VALUES:
        limits = f">= 1 dimensions, each <= {MAX_SIDE}, and <= {MAX_VALUES} values"
        raise unreadable(path, f"{printable(name)} must have {limits}, got shape {shape}")
