"""Writer of LoRA files as kohya's trainer writes them for image models.

Each module has ``lora_down``, ``lora_up`` and a number ``alpha``, so the scale is alpha / rank. DoRA adds
``dora_scale``, as in LyCORIS. Names have underscores instead of dots, after a prefix for the component:

- ``lora_unet_`` for UNets. That of SDXL has the names of its authors, as in kohya's trainer, and others those of
  diffusers.
- ``lora_transformer_`` for transformers with the names of diffusers, as OneTrainer writes them, because kohya joins
  query, key and value in one module; ``lora_unet_`` with the names of the authors.
- ``lora_te_`` for the text encoder of Stable Diffusion 1 and 2, else ``lora_te1_`` and ``lora_te2_`` for CLIP and
  ``lora_te3_`` for T5.

Source: kohya-ss/sd-scripts (``networks/lora.py``), lycoris-lora 4.1.3, OneTrainer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from lorascope.export.lora_layers import LoraLayer, WritableLora
from lorascope.export.pipeline_names import AUTHORS, PipelineLayer, named_layers
from lorascope.export.writers import writes
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import write_bytes
from lorascope.files.typed_tensors import TypedTensor, safetensors_bytes
from lorascope.formats.image_names import to_authors
from lorascope.formats.kohya import BASE_KEYS
from lorascope.runs.lora_config import alpha_of

_PREFIXES = {"unet": "lora_unet", AUTHORS: "lora_unet", "prior": "lora_prior_unet", "transformer": "lora_transformer"}
_T5 = re.compile(r"encoder\.block\.\d")
# Stable Diffusion 1 and 2 have one transformer block per attention, SDXL up to ten.
_SDXL = re.compile(r"(?:down|mid|up)_block\S*\.transformer_blocks\.[1-9]")


@writes("kohya", "read_kohya")
def write_kohya(lora: WritableLora, path: Path) -> None:
    """Write layers as a new file."""
    if path.suffix != ".safetensors":
        raise lora.error("kohya", f"the file must end in .safetensors, got {printable(path)}")
    lora.require_only_layers("kohya")
    layers = named_layers(lora, "kohya")
    described = "".join(lora.config.get(key, "") for key in BASE_KEYS[:2])
    large = "xl" in described or any(each.component == "unet" and _SDXL.match(each.name) for each in layers)
    names: dict[str, str] = {}
    tensors: dict[str, TypedTensor] = {}
    for each in layers:
        key = each.name if each.flat else _flat_name(lora, each, {each.component for each in layers}, large)
        if key in names:
            raise lora.error("kohya", f"{printable(names[key])} and {printable(each.module)} would both be {key}")
        names[key] = each.module
        tensors |= {f"{key}.{part}": tensor for part, tensor in _tensors(lora, each)}
    ranks, alphas = zip(*((each.layer.rank, _alpha(each.layer)) for each in layers), strict=True)
    decomposed = any(each.layer.magnitude for each in layers)
    words = {key: lora.config[key] for key in BASE_KEYS if key in lora.config}
    words |= {"ss_network_module": "lycoris.kohya" if decomposed else "networks.lora"}
    words |= {"ss_network_dim": _common(ranks), "ss_network_alpha": _common(alphas)}
    if not words.keys() & set(BASE_KEYS) and "base_model_name_or_path" in lora.config:
        words["ss_sd_model_name"] = str(lora.config["base_model_name_or_path"])
    write_bytes(path, safetensors_bytes(tensors, words))


def _flat_name(lora: WritableLora, each: PipelineLayer, components: Collection[str], large: bool) -> str:
    """Return the name of a module; ``large`` if the UNet has SDXL's size."""
    flat = each.name.replace(".", "_")
    prefix = _PREFIXES.get(each.component)
    if each.component.startswith("text_encoder"):
        number = each.component.removeprefix("text_encoder").removeprefix("_")
        several = large or any(name not in ("unet", "text_encoder") for name in components)
        prefix = "lora_te3" if _T5.match(each.name) else f"lora_te{number or '1' * several}"
        if "prior" in components:
            prefix = "lora_prior_te"
    if prefix is None or each.component.startswith("text_encoders."):
        raise lora.error("kohya", f"{printable(each.module)} belongs to {each.component}, which has no prefix there")
    return f"{prefix}_{(to_authors(flat) or flat) if large and each.component == 'unet' else flat}"


def _tensors(lora: WritableLora, each: PipelineLayer) -> Iterator[tuple[str, TypedTensor]]:
    """Yield the tensors of one module."""
    layer, name = each.layer, printable(each.module)
    if layer.embedding:
        raise lora.error("kohya", f"{name} is an embedding")
    alpha = _alpha(layer)
    if alpha == 0:
        raise lora.error("kohya", f"{name} has scale 0, and alpha 0 means the rank there")
    A, B = layer.kernel_factors()
    yield "lora_down.weight", A
    yield "lora_up.weight", B
    yield "alpha", TypedTensor(np.array(alpha), "F32" if float(np.float32(alpha)) == alpha else "F64")
    if layer.magnitude is not None:
        sides = (-1, 1, *(1 for _ in layer.kernel))
        yield "dora_scale", layer.magnitude.map(lambda values: values.reshape(sides))


def _alpha(layer: LoraLayer) -> float:
    return float(alpha_of(layer.scale, layer.rank))


def _common(values: Collection[float]) -> str:
    """Return the only value as text, or "Dynamic" as kohya's trainer does for several."""
    return str(next(iter(values))) if len(set(values)) == 1 else "Dynamic"
