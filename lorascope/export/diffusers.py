"""Writer of LoRA files of diffusers: ``pytorch_lora_weights.safetensors``.

The names of modules start with a component of the pipeline. The header has the configuration of each component, with
ranks and alphas of its modules, which diffusers passes to ``peft.LoraConfig``. A path with the ending .safetensors is
the file, any other is a folder with the file.

Source: diffusers 0.42.1 (``loaders/lora_base.py``, ``utils/state_dict_utils.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorascope.export.exporters import LayerExporter
from lorascope.export.lora_layers import LoraLayer, WritableLora, layer_keywords
from lorascope.export.peft_adapter import layer_tensors
from lorascope.export.pipeline_names import PIPELINE, named_layers, refuse_flat
from lorascope.files.printable import printable
from lorascope.files.typed_tensors import TypedTensor, safetensors_bytes
from lorascope.files.whole_files import write_bytes, write_new
from lorascope.formats.image_keys import METADATA
from lorascope.runs.folders import new_folder

WEIGHTS = "pytorch_lora_weights.safetensors"


class DiffusersExporter(LayerExporter):
    """Exporter of LoRA files of diffusers, or of folders with one."""

    format = "diffusers"
    readers = ("read_diffusers",)

    def write(self, lora: WritableLora, path: Path) -> None:
        lora.require_only_layers("diffusers")
        modules = named_layers(lora, "diffusers")
        refuse_flat(lora, modules, "diffusers")
        components: dict[str, dict[str, LoraLayer]] = {}
        for module in modules:
            if module.component not in PIPELINE:
                reason = f"{printable(module.path)} has a name of the model's authors; pass the base model, --base DIR"
                raise lora.error("diffusers", reason)
            if module.layer.embedding:
                raise lora.error("diffusers", f"{printable(module.path)} is an embedding")
            layers = components.setdefault(module.component, {})
            if module.name in layers:
                name = f"{printable(module.component)}.{printable(module.name)}"
                raise lora.error("diffusers", f"{name} would be written twice")
            layers[module.name] = module.layer
        tensors: dict[str, TypedTensor] = {}
        settings: dict[str, Any] = {}
        for component, layers in components.items():
            for key, value in _settings(lora, layers).items():
                settings[f"{component}.{key}"] = value
            for name, layer in layers.items():
                for end, tensor in layer_tensors(layer).items():
                    tensors[f"{component}.{name}.{end}"] = tensor
        # diffusers writes its configurations with the same options of JSON.
        metadata = {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}
        content = safetensors_bytes(tensors, metadata)
        if path.suffix == ".safetensors":
            write_new(path, content)
            return
        with new_folder(path) as draft:
            write_bytes(draft / WEIGHTS, content)


def _settings(lora: WritableLora, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """Return the configuration of one component."""
    settings: dict[str, Any] = {"use_dora": replace(lora, layers=layers).decomposed("diffusers")}
    for name in ("base_model_name_or_path", "revision"):
        if lora.config.get(name) is not None:
            settings[name] = lora.config[name]
    return settings | layer_keywords(layers, layers)
