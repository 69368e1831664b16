"""Reader of LoRA files by diffusers: ``pytorch_lora_weights.safetensors``.

The names of modules start with a component of the pipeline, such as ``unet`` or ``text_encoder``. The header may have
the configurations of all components, ``lora_adapter_metadata``, with PEFT's ranks, alphas and patterns; the scale of a
module is alpha / rank. Older files have no alpha, so their scale is 1, and may have other names for attention modules.

Source: diffusers 0.42.1 (``loaders``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable
from lorascope.files.typed_json import parse_json, to_typed
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.image_keys import METADATA, Tensors, is_diffusers
from lorascope.formats.kohya import image_adapter
from lorascope.formats.lycoris import Scale
from lorascope.formats.peft_lora import RanksAndScales
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles

_UNKNOWN = "alpha was not kept: |dW| is the norm of B A, without the factor alpha / r"


@reads(is_diffusers, "LoRA of diffusers, with alphas in the file's header")
def read_diffusers(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a LoRA file of diffusers."""
    settings = _settings(path, config)
    source = f"{METADATA} of {path}"
    components = {name: RanksAndScales(source, values) for name, values in settings.items()}

    def scale(module: str, tensors: Tensors) -> Scale:
        component, _, inside = module.partition(".")
        if component in components:
            return _scale(components[component], inside)
        if "" in components:  # of a single model, whose settings have no component
            return _scale(components[""], module)
        return lambda rank: 1.0  # files without metadata have no alpha

    adapter = image_adapter(path, config, files, base, scale, "diffusers")
    if not components:
        return replace(adapter, notes=(_UNKNOWN, *adapter.notes))
    bases = {str(values.get("base_model_name_or_path") or "") for values in settings.values()} - {""}
    if len(bases) != 1:  # components may name different models
        return adapter
    return replace(adapter, config={"base_model_name_or_path": bases.pop()} | adapter.config)


def _scale(settings: RanksAndScales, module: str) -> Scale:
    """Return the scale of a module, which checks the rank of its factors."""

    def scale(rank: int) -> float:
        if rank != (stated := settings.rank(module)):
            raise AdapterFault("rank", METADATA, f"factors of {printable(module)} must have rank {stated}, got {rank}")
        return settings.scale(module)

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
