"""Writer of PEFT folders from adapters: converted from another format, cut to a budget, or summed.

The folder adapts one model, so the names of its modules do not start with the component of a pipeline. The heads,
biases and token rows of a PEFT adapter are written as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorascope.export.exporters import LayerExporter
from lorascope.export.lora_layers import LoraLayer, WritableLora, layer_keywords
from lorascope.export.peft_folder import write_peft_folder
from lorascope.export.pipeline_names import pipeline_layers, refuse_flat, split_name
from lorascope.files.printable import printable
from lorascope.files.typed_tensors import TypedTensor, safetensors_bytes
from lorascope.formats.peft_whole_weights import whole_weights
from lorascope.formats.stored_update import PREFIX, plain_name, uncompiled_name

# The other keys of a configuration describe how the adapter was trained.
_CONFIG_FIELDS = (
    *("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "modules_to_save", "bias"),
    *("trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
)
_README = """---
base_model: {base}
library_name: peft
---

A {kind} adapter, written by lorascope from {source}.
"""


class PeftExporter(LayerExporter):
    """Exporter of an adapter as a PEFT folder, with the further weights of a PEFT adapter."""

    format = "peft"
    readers = ("read_adapter", "read_dora")

    def write(self, lora: WritableLora, path: Path) -> None:
        layers = _of_one_model(lora)
        decomposed = lora.decomposed("PEFT")
        tensors = dict(_further_weights(lora))
        for name, layer in layers.items():
            for factor, tensor in layer_tensors(layer).items():
                tensors[f"{PREFIX}{name}.{factor}"] = tensor
        fields: dict[str, Any] = {"fan_in_fan_out": False, "bias": "none"}
        if "fine_tune_type" in lora.config:  # of mlx-lm, which adapts only language models
            fields["task_type"] = "CAUSAL_LM"
        fields |= lora.config
        config = {name: fields[name] for name in _CONFIG_FIELDS if fields.get(name) is not None}
        config |= {"peft_type": "LORA", "inference_mode": True, "lora_dropout": 0.0}
        kind = "LoRA"
        if decomposed:
            kind, config["use_dora"] = "DoRA", True
        modules = {split_name(lora.config, module)[1] for module in lora.adapter.files.parts}
        config |= layer_keywords(layers, modules)
        card = _README.format(base=printable(lora.adapter.meta.model), kind=kind, source=printable(lora.source))
        write_peft_folder(path, safetensors_bytes(tensors, {"format": "pt"}), config, card)


def _of_one_model(lora: WritableLora) -> dict[str, LoraLayer]:
    """Return the layers by their names in the model; raise a ValueError if they belong to several models."""
    modules = pipeline_layers(lora)
    refuse_flat(lora, modules, "PEFT")
    components = dict.fromkeys(module.component for module in modules)
    if len(components) > 1:
        names = " and ".join(component or "a model without a name" for component in components)
        raise lora.error("PEFT", f"a folder has one model, and it adapts {printable(names)}")
    return {module.name: module.layer for module in modules}


def layer_tensors(layer: LoraLayer) -> dict[str, TypedTensor]:
    """Return the tensors of an adapter's layer in a PEFT folder by the ends of their names."""
    A, B = layer.kernel_factors()
    ending = "lora_embedding_{}" if layer.embedding else "lora_{}.weight"
    tensors = {ending.format("A"): A, ending.format("B"): B}
    if layer.magnitude is not None:
        # PEFT keeps the axes of a convolution, whose norms it takes over all axes but the outputs.
        sides = (1, -1, *[1] * len(layer.kernel)) if layer.kernel else (-1,)
        tensors["lora_magnitude_vector"] = layer.magnitude.map(lambda values: values.reshape(sides))
    return tensors


def _further_weights(lora: WritableLora) -> Mapping[str, TypedTensor]:
    """Return the weights that PEFT stores in addition to factors, by their full names."""
    if "peft_type" not in lora.config:
        lora.require_only_layers("PEFT")
    # lora_B.bias is multiplied by the scale, which a budget changes.
    for weight in whole_weights(lora.adapter.files):
        if weight.kind == "bias update":
            reason = f"the bias of the factors (lora_bias) of {printable(weight.module)} is not supported"
            raise lora.error("PEFT", reason)
    further_names = set(lora.adapter.files.others)
    tensors: dict[str, TypedTensor] = {}
    for file in lora.adapter.files.files:
        for name in file:
            if plain_name(name) in further_names:
                tensors[uncompiled_name(name)] = TypedTensor.read(file, name)
    return tensors
