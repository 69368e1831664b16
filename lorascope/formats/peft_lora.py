"""Reader of PEFT LoRA folders: adapted modules, factors and scales.

A folder contains ``adapter_config.json`` and ``adapter_model.safetensors``, which may be split into shards. Names and
shapes are read from the headers; a factor is loaded when its update is accessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile, open_tensors
from lorascope.files.typed_json import to_typed, unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.hydralora import has_heads
from lorascope.formats.peft_config import CONFIG, LoraConfig, peft_kind
from lorascope.formats.peft_factors import (
    Factors,
    GroupedFactors,
    group_factors,
    no_factors,
    stored_shape,
    ungathered_factors,
)
from lorascope.formats.peft_modules import OUT_PROJ, complete_lora, stacked_base
from lorascope.formats.peft_residual import change_from_original_base
from lorascope.formats.peft_whole_weights import UNUSED
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA, StoredTensor
from lorascope.schema.name_patterns import per_module

# E is a factor of AdaLoRA, diag of KaSA and magnitude_vector of DoRA. The adapter name may follow that of the factor if
# a state dict was saved by hand.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>A|B|E|diag|magnitude_vector)(?:\.(?!bias$|weight$)[^.]+)?(?:\.weight)?",
    re.DOTALL,  # a name may contain a line break
)
_LORA = re.compile(r"\.lora_")
# The other tensors named lora belong to variants; a trained bias of B does not.
_VARIANT = re.compile(r"\.lora_(?!B\.bias$)")


def factor_files(path: Path) -> list[Path]:
    """Return the safetensors files of a PEFT folder that contain LoRA factors, regardless of their names."""
    files = sorted(filter(Path.is_file, path.glob("*.safetensors")))
    return [file for file in files if any(map(_LORA.search, open_tensors(file)))]


def lora_factors(path: Path, files: Iterable[TensorFile], expected: Sequence[str]) -> GroupedFactors:
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
            raise AdapterFault("incomplete", path, f"{printable(module)} has {present} but no lora_{missing[0]}")
        if extra := [name for name in factors if name not in expected]:
            option = {"magnitude_vector": "use_dora", "E": "peft_type ADALORA", "diag": "kasa_config"}[extra[0]]
            raise AdapterFault("rank", path, f"{printable(module)} has lora_{extra[0]}, but {CONFIG} lacks {option}")
    return module_factors, other_names


def is_lora(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Return whether a PEFT adapter is a plain LoRA, with or without experts in one tensor."""
    # enable_lora is of loralib's MergedLinear, whose factors have blocks.
    other = config.get("use_dora") or "enable_lora" in config or has_heads(names)
    return peft_kind(config) == "LORA" and not other


@reads(
    lambda config, names: is_lora(config, names) and not config.get("target_parameters"),
    "LoRA (PEFT), with rsLoRA, patterns, embeddings, convolutions and tied weights",
)
def read_adapter(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT LoRA folder."""
    module_factors, other_names = lora_factors(path, files, ("A", "B"))
    base = stacked_base(path, config, module_factors, base)
    updates = change_from_original_base(config, lora_parts(path, config, module_factors), base)
    return complete_lora(AdapterFiles(path, dict(config), updates, other_names, files, base=base))


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
        if name.endswith(OUT_PROJ):
            scale *= 2  # PEFT 0.21 adds the update of this projection twice, in every forward pass and on merging
        return scale


def lora_parts(path: Path, config: Config, module_factors: Mapping[str, Factors]) -> dict[str, StoredLoRA]:
    """Return the stored updates of a PEFT LoRA, scale * B @ A, with the ranks and scales of its configuration."""
    settings, updates = RanksAndScales(path / CONFIG, config), {}
    for module, factors in module_factors.items():
        check_rank(path, module, factors, settings.rank(module))
        A = factors["A"]
        transposed = is_transposed(A, settings.settings.fan_in_fan_out)
        updates[module] = StoredLoRA(factors["B"], A, settings.scale(module), transposed)
    return updates


def check_rank(path: Path, module: str, factors: Factors, rank: int) -> None:
    """Raise a ValueError if the rank of a PEFT LoRA's factors differs from its configuration."""
    ranks = factors["A"].shape[0], factors["B"].shape[1]
    if ranks == (0, 0) and rank:  # AdaLoRA may remove all components of a module
        raise ungathered_factors(path, [module])
    if 1 in (len(stored_shape(factors["A"])), len(stored_shape(factors["B"]))):
        raise ungathered_factors(path, [module], "flat")
    if ranks[0] != ranks[1]:
        reason = f"factors of {printable(module)} must have one rank, got {ranks[0]} (lora_A) and {ranks[1]} (lora_B)"
        raise AdapterFault("shape", path, reason)
    if ranks != (rank, rank):
        must = f"factors of {printable(module)} must have rank {rank} ({CONFIG})"
        raise AdapterFault("rank", path, f"{must}, got {ranks[0]} and {ranks[1]}")


def is_transposed(A: StoredTensor, fan_in_fan_out: bool | None) -> bool:
    """Return whether the base of a PEFT LoRA stores the weight as (in, out), as it does for embeddings."""
    return bool(fan_in_fan_out) or ".lora_embedding_" in A.name
