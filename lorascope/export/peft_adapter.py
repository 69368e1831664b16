"""Writer of PEFT folders from adapters: converted from another format, cut to a budget, or summed.

The folder adapts one model, so the names of its modules do not start with the component of a pipeline. The heads,
biases and token rows of a PEFT adapter are written as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorascope.export.lora_layers import LoraLayer, WritableLora
from lorascope.export.pipeline_names import pipeline_layers, refuse_flat, split_name
from lorascope.export.writers import writes
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import write_bytes, write_json
from lorascope.files.typed_tensors import TypedTensor, safetensors_bytes
from lorascope.formats.peft_lora import CONFIG, WEIGHTS
from lorascope.formats.peft_whole_weights import whole_weights
from lorascope.formats.stored_update import PREFIX
from lorascope.runs.folders import new_folder
from lorascope.runs.lora_config import lora_keywords

# Keys of the configuration that stay; all others describe how the adapter was trained.
_KEPT = (
    *("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "modules_to_save", "bias"),
    *("trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
)
_DEFAULTS = {"fan_in_fan_out": False, "bias": "none"}
_README = """---
base_model: {base}
library_name: peft
---

A {kind} adapter, written by lorascope from {source}.
"""


@writes("peft", "read_adapter", "read_dora")
def write_peft(lora: WritableLora, path: Path) -> None:
    """Write layers as a new PEFT folder, with the further weights of a PEFT adapter."""
    layers = _of_one_model(lora)
    decomposed = lora.decomposed("PEFT")
    tensors = dict(_further_weights(lora))
    for name, layer in layers.items():
        for factor, tensor in layer_tensors(layer).items():
            tensors[f"{PREFIX}{name}.{factor}"] = tensor
    given = _DEFAULTS | ({"task_type": "CAUSAL_LM"} if "fine_tune_type" in lora.config else {}) | dict(lora.config)
    config = {name: given[name] for name in _KEPT if given.get(name) is not None}
    config |= {"peft_type": "LORA", "inference_mode": True, "lora_dropout": 0.0}
    config |= {"use_dora": True} if decomposed else {}
    ranks = {name: layer.rank for name, layer in layers.items()}
    known = {split_name(lora.config, module)[1] for module in lora.adapter.files.parts}
    config |= lora_keywords(ranks, {name: layer.scale for name, layer in layers.items()}, known)
    kind = "DoRA" if decomposed else "LoRA"
    about = _README.format(base=printable(lora.adapter.meta.model), kind=kind, source=printable(lora.source))
    with new_folder(path) as draft:
        write_bytes(draft / WEIGHTS, safetensors_bytes(tensors, {"format": "pt"}))
        write_json(draft / CONFIG, config)
        write_bytes(draft / "README.md", about.encode())


def _of_one_model(lora: WritableLora) -> dict[str, LoraLayer]:
    """Return the layers by their names in the model; raise a ValueError if they belong to several models."""
    layers = pipeline_layers(lora)
    refuse_flat(lora, layers, "PEFT")
    components = dict.fromkeys(each.component for each in layers)
    if len(components) > 1:
        named = " and ".join(component or "a model without a name" for component in components)
        raise lora.error("PEFT", f"a folder has one model, and it adapts {printable(named)}")
    return {each.name: each.layer for each in layers}


def layer_tensors(layer: LoraLayer) -> dict[str, TypedTensor]:
    """Return the tensors of one module by the ends of their names."""
    A, B = layer.kernel_factors()
    ending = "lora_embedding_{}" if layer.embedding else "lora_{}.weight"
    found = {ending.format("A"): A, ending.format("B"): B}
    if layer.magnitude is not None:
        sides = (1, -1, *(1 for _ in layer.kernel)) if layer.kernel else (-1,)
        found["lora_magnitude_vector"] = layer.magnitude.map(lambda values: values.reshape(sides))
    return found


def _further_weights(lora: WritableLora) -> Mapping[str, TypedTensor]:
    """Return the weights that PEFT stores in addition to factors, by their full names."""
    if "peft_type" not in lora.config:
        lora.require_only_layers("PEFT")
    # lora_B.bias is multiplied by the scale, which a budget changes.
    biased = next((each.module for each in whole_weights(lora.adapter.files) if each.kind == "bias update"), None)
    if biased is not None:
        raise lora.error("PEFT", f"the bias of the factors (lora_bias) of {printable(biased)} is not supported")
    names = set(lora.adapter.files.others)
    files = lora.adapter.files.files
    found = ((file, name) for file in files for name in file if name.removeprefix(PREFIX) in names)
    return {name: TypedTensor.read(file, name) for file, name in found}
