"""Reader of LoRA files by diffusers: ``pytorch_lora_weights.safetensors``.

The names of modules start with a component of the pipeline, such as ``unet`` or ``text_encoder``. The header may have
the configurations of all components, ``lora_adapter_metadata``, with PEFT's ranks, alphas and patterns; the scale of a
module is alpha / rank. Older files have no alpha, so their scale is 1, and may have other names for attention modules.

Source: diffusers 0.42.1 (``loaders``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import parse_json, to_typed, unreadable
from lorascope.runs.formats.image_keys import METADATA, Parts, is_diffusers
from lorascope.runs.formats.kohya import image_adapter
from lorascope.runs.formats.lycoris import Scale
from lorascope.runs.formats.peft_lora import LoraConfig
from lorascope.runs.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.formats.registry import reads
from lorascope.runs.formats.stored_update import AdapterFiles
from lorascope.schema.name_patterns import Patterns

_UNKNOWN = "alpha was not kept: |dW| is the norm of B A, without the factor alpha / r"


@reads(is_diffusers, "LoRA of diffusers, with alphas in the file's header")
def read_diffusers(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None = None
) -> AdapterFiles:
    """Read the modules of an opened file."""
    settings = _settings(path, config)
    source = f"{METADATA} of {path}"
    components = {name: _Component(name, to_typed(found, LoraConfig, source)) for name, found in settings.items()}

    def scale(module: str, parts: Parts) -> Scale:
        component, _, inside = module.partition(".")
        found = components.get(component)
        return found.scale(inside) if found else components[""].scale(module) if "" in components else lambda rank: 1.0

    read = image_adapter(path, config, files, base, scale, "diffusers")
    if not components:
        return replace(read, notes=(_UNKNOWN, *read.notes))
    bases = {str(name) for found in settings.values() if (name := found.get("base_model_name_or_path"))}
    known = {"base_model_name_or_path": bases.pop()} if len(bases) == 1 else {}
    return replace(read, config=known | read.config)


class _Component:
    """Configuration of one component."""

    def __init__(self, name: str, config: LoraConfig) -> None:
        self._name, self._config = name, config
        self._ranks = Patterns(config.rank_pattern or {}, f"{name}.rank_pattern")
        self._alphas = Patterns(config.alpha_pattern or {}, f"{name}.alpha_pattern")

    def scale(self, module: str) -> Scale:
        """Return the scale of a module, checked against the rank of its factors."""
        config, rank_key, alpha_key = self._config, self._ranks.first(module), self._alphas.first(module)
        stated = config.r if rank_key is None else (config.rank_pattern or {})[rank_key]
        alpha = config.lora_alpha if alpha_key is None else (config.alpha_pattern or {})[alpha_key]

        def scale(rank: int) -> float:
            if rank != stated:
                raise unreadable(METADATA, f"factors of {printable(module)} must have rank {stated}, got {rank}")
            return alpha / (math.sqrt(rank) if config.use_rslora else rank)

        return scale


def _settings(path: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of each component; "" for the only one of a file without components."""
    text = config.get(METADATA)
    if text is None:
        return {}
    name = f"{METADATA} of {path}"
    content = to_typed(parse_json(to_typed(text, str, name), name), dict[str, Any], name)
    settings: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, _, field = key.rpartition(".")
        settings.setdefault(component, {})[field] = value
    return settings
