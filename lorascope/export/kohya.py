"""Writer of LoRA files as kohya's trainer writes them for image models.

Each module has ``lora_down``, ``lora_up`` and a number ``alpha``, so the scale is alpha / rank. diffusers 0.42 gives
attention modules the most frequent alpha and drops the magnitudes of DoRA (``dora_scale``). Therefore all modules get
the most frequent alpha, ``lora_up`` is multiplied by what differs, and DoRA is refused. Names have underscores instead
of dots, after a prefix for the component:

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
from statistics import mode

import numpy as np

from lorascope.export.exporters import LayerExporter
from lorascope.export.lora_layers import LoraLayer, WritableLora
from lorascope.export.pipeline_names import AUTHORS, PipelineLayer, named_layers
from lorascope.files.printable import printable
from lorascope.files.typed_tensors import TypedTensor, safetensors_bytes
from lorascope.files.whole_files import write_new
from lorascope.formats.image_names import to_authors
from lorascope.formats.kohya import BASE_KEYS
from lorascope.runs.lora_config import alpha_of

_PREFIXES = {"unet": "lora_unet", AUTHORS: "lora_unet", "prior": "lora_prior_unet", "transformer": "lora_transformer"}
# CLIP has encoder.layers instead.
_T5 = re.compile(r"encoder\.block\.\d")
# Stable Diffusion 1 and 2 have one transformer block per attention, SDXL up to ten.
_SDXL = re.compile(r"(?:down|mid|up)_block\S*\.transformer_blocks\.[1-9]")


class KohyaExporter(LayerExporter):
    """Exporter of LoRA files of kohya's trainer."""

    format = "kohya"
    readers = ("read_kohya",)

    def write(self, lora: WritableLora, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise lora.error("kohya", f"the file must end in .safetensors, got {printable(path)}")
        lora.require_only_layers("kohya")
        if not all(layer.magnitude is None for layer in lora.layers.values()):
            reason = "diffusers drops the magnitudes of DoRA in such files; write it with --diffusers"
            raise lora.error("kohya", reason)
        modules = named_layers(lora, "kohya")
        alpha = mode(_alpha(module.layer) for module in modules)
        components = {module.component for module in modules}
        is_sdxl = any(module.component == "unet" and _SDXL.match(module.name) for module in modules)
        # An adapter of few blocks does not show the size of its UNet, but the header may name it.
        is_sdxl |= any("xl" in lora.config.get(key, "") for key in BASE_KEYS[:2])
        paths: dict[str, str] = {}
        tensors: dict[str, TypedTensor] = {}
        for module in modules:
            key = _flat_name(lora, module, components, is_sdxl)
            if key in paths:
                pair = f"{printable(paths[key])} and {printable(module.path)}"
                raise lora.error("kohya", f"{pair} would both be {key}")
            paths[key] = module.path
            for end, tensor in _tensors(lora, module, alpha):
                tensors[f"{key}.{end}"] = tensor
        base = {key: lora.config[key] for key in BASE_KEYS if key in lora.config}
        ranks = {module.layer.rank for module in modules}
        rank = "Dynamic" if len(ranks) > 1 else str(ranks.pop())  # as kohya's trainer writes several
        metadata = base | {"ss_network_module": "networks.lora"}
        metadata |= {"ss_network_dim": rank, "ss_network_alpha": f"{alpha:g}"}
        # The key of the header that names a base of any kind.
        if not base and "base_model_name_or_path" in lora.config:
            metadata["ss_sd_model_name"] = str(lora.config["base_model_name_or_path"])
        write_new(path, safetensors_bytes(tensors, metadata))


def _flat_name(lora: WritableLora, module: PipelineLayer, components: Collection[str], is_sdxl: bool) -> str:
    """Return the name of a module with its prefix, and underscores instead of dots."""
    if module.flat:
        return module.name
    name = module.name.replace(".", "_")
    prefix = _PREFIXES.get(module.component)
    if module.component.startswith("text_encoder"):
        prefix = _text_encoder_prefix(module, components, is_sdxl)
    if prefix is None or module.component.startswith("text_encoders."):
        reason = f"{printable(module.path)} belongs to {module.component}, which has no prefix there"
        raise lora.error("kohya", reason)
    if is_sdxl and module.component == "unet":
        name = to_authors(name) or name
    return f"{prefix}_{name}"


def _text_encoder_prefix(module: PipelineLayer, components: Collection[str], is_sdxl: bool) -> str:
    """Return the prefix of a module of a text encoder."""
    if "prior" in components:
        return "lora_prior_te"
    if _T5.match(module.name):
        return "lora_te3"
    number = module.component.removeprefix("text_encoder").removeprefix("_")
    # Only Stable Diffusion 1 and 2 have a single text encoder, next to a UNet.
    is_numbered = is_sdxl or not {"unet", "text_encoder"}.issuperset(components)
    return f"lora_te{number or '1' * is_numbered}"


def _tensors(lora: WritableLora, module: PipelineLayer, alpha: float) -> Iterator[tuple[str, TypedTensor]]:
    """Yield the tensors of one module by the ends of their names, with the alpha of the file."""
    layer, name = module.layer, printable(module.path)
    if layer.embedding:
        raise lora.error("kohya", f"{name} is an embedding")
    own_alpha = _alpha(layer)
    if own_alpha == 0:
        # ComfyUI takes alpha 0 literally, but kohya's trainer and LyCORIS take it as the rank.
        raise lora.error("kohya", f"{name} has scale 0, and alpha 0 means the rank there")
    A, B = layer.kernel_factors()
    yield "lora_down.weight", A
    if own_alpha != alpha:
        B = TypedTensor.fitting(np.asarray(B.values, np.float64) * (own_alpha / alpha), B.dtype)
    yield "lora_up.weight", B
    dtype = "F32"  # as kohya's trainer writes it
    if float(np.float32(alpha)) != alpha:
        dtype = "F64"  # float32 would round the scale
    yield "alpha", TypedTensor(np.array(alpha), dtype)


def _alpha(layer: LoraLayer) -> float:
    return float(alpha_of(layer.scale, layer.rank))
