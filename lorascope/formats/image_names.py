"""Modules of a base model by the names that adapters of image models give them.

kohya replaces the dots of a name by underscores, which cannot be inverted, so names are compared with underscores. It
trains SDXL with the names of the model's authors, as in single-file checkpoints, and Stable Diffusion 1 with those of
diffusers; modules of UNets and of Flux are found under both. The authors of Flux join query, key and value in one
module, whose rows are several modules of diffusers. The last modulation has its two halves of rows swapped there.

Source: diffusers 0.42.1 (``loaders/single_file_utils.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorascope.schema.image_roles import FLATTENED
from lorascope.schema.name_patterns import Ends

_ORIGINAL = re.compile(r"(?:model\.)?diffusion_model\.")
# Components of a pipeline for the prefixes of kohya; text encoders count from one.
_COMPONENTS = {
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_prior_unet": "prior",
    "lora_prior_te": "text_encoder",
}
_BLOCKS = re.compile(r"(?=(?:double|single)_blocks\.)")
_DENOISERS = ("unet", "transformer")

_BLOCK = re.compile(r"(input|middle|output)_blocks?_(\d+)_(?:(\d)_)?(.+)")
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out_linear",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
}
_FLUX = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
_FLUX_NAMES = {
    "img_attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
    "txt_attn_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"),
    "img_attn_proj": ("attn_to_out_0",),
    "txt_attn_proj": ("attn_to_add_out",),
    "img_mlp_0": ("ff_net_0_proj",),
    "img_mlp_2": ("ff_net_2",),
    "txt_mlp_0": ("ff_context_net_0_proj",),
    "txt_mlp_2": ("ff_context_net_2",),
    "img_mod_lin": ("norm1_linear",),
    "txt_mod_lin": ("norm1_context_linear",),
    "linear1": ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm_linear",),
}
"""Modules of diffusers by those of the authors, in the order of the rows."""
_RESNET_AUTHORS = {name: authors for authors, name in _RESNET.items()}
# Without the names of Flux, which has no UNet.
_UNET_OUTSIDE = {
    name: authors for authors, name in _OUTSIDE.items() if re.match("input|time_embed|label|out_", authors)
}
_UNET_BLOCK = re.compile(
    r"(?P<side>down|mid|up)_blocks?_(?:(?P<block>\d+)_)?(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"_(?P<index>\d+)_(?P<inside>.+)"
)
_MIDDLE = {0: "resnets_0", 1: "attentions_0", 2: "resnets_1"}


class BaseNames:
    """Modules of a base model by the flattened names that adapters of image models use.

    Parameters
    ----------
    modules : iterable of str
        Names of the modules that have a weight.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._modules = set(modules)
        self._flat: dict[str, list[str]] = {}
        for module in sorted(self._modules):
            self._flat.setdefault(module.replace(".", "_"), []).append(module)
        self._ends = Ends(self._flat)

    def find(self, name: str) -> tuple[str, ...]:
        """Return the modules of the base that an adapter gives this name, in the order of their rows; () if none."""
        prefix = _ORIGINAL.match(name) or ("." not in name and FLATTENED.match(name)) or _BLOCKS.match(name)
        if name in self._modules:
            return (name,)
        if not prefix:
            return ()
        flat = name[prefix.end() :].replace(".", "_")
        component = _COMPONENTS.get(prefix[0].strip("_"))
        components = (component,) if component else _DENOISERS
        # The base may have the names of the authors or those of diffusers.
        for names in ((flat,), _to_diffusers(flat)):
            modules = tuple(self._only_module(inside, components) for inside in names)
            if all(modules):
                return modules
        longer: list[str] = []
        for end in self._ends.names_with_end(f"_{flat}"):
            longer += self._flat[end]
        return tuple(longer) if len(longer) == 1 else ()

    def _only_module(self, flat: str, components: Iterable[str]) -> str:
        """Return the only module of this name, with or without one of the components; "" if there is none."""
        for name in (*(f"{component}_{flat}" for component in components), flat):
            modules = self._flat.get(name, [])
            if len(modules) == 1:
                return modules[0]
        return ""


def swaps_halves(name: str, module: str) -> bool:
    """Return whether an image model's module has scale before shift in diffusers, unlike under the authors' name."""
    return module.endswith("norm_out.linear") and name.replace(".", "_").endswith("final_layer_adaLN_modulation_1")


def _to_diffusers(name: str) -> tuple[str, ...]:
    """Return the names in diffusers of a module, all with underscores, in the order of their rows; () if unknown."""
    if name in _OUTSIDE:
        return (_OUTSIDE[name],)
    if (match := _FLUX.fullmatch(name)) is not None:
        stem = f"{'single_' * (match[1] == 'single')}transformer_blocks_{match[2]}"
        return tuple(f"{stem}_{inside}" for inside in _FLUX_NAMES.get(match[3], ()))
    match = _BLOCK.fullmatch(name)
    return () if match is None else (_unet_name(match),)


def _unet_name(match: re.Match[str]) -> str:
    side, number, position, inside = match[1], int(match[2]), int(match[3] or 0), match[4]
    inside = _RESNET.get(inside, inside)
    if side == "middle":
        return f"mid_block_{_MIDDLE.get(number)}_{inside}"
    # Three of the authors' blocks are one of diffusers; the first input block is the convolution before all of them.
    block, index = divmod(number - (side == "input"), 3)
    half = "down" if side == "input" else "up"
    if inside == "op" or (side == "output" and inside == "conv"):
        return f"{half}_blocks_{block}_{half}samplers_0_conv"
    return f"{half}_blocks_{block}_{'attentions' if position else 'resnets'}_{index}_{inside}"


def to_authors(name: str) -> str:
    """Translate the name of an image model's module from diffusers to the SDXL authors', with underscores.

    Return "" if the name is unknown.
    """
    if (match := _UNET_BLOCK.fullmatch(name)) is None:
        return _UNET_OUTSIDE.get(name, "")
    side, kind, inside = match["side"], match["kind"], match["inside"]
    block, index = int(match["block"] or 0), int(match["index"])
    if kind == "resnets":
        inside = _RESNET_AUTHORS.get(inside, inside)
    if side == "mid":
        number = 2 * index if kind == "resnets" else 1
        return f"middle_block_{number}_{inside}"
    if kind == "downsamplers":
        return f"input_blocks_{3 * block + 3}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{3 * block + 2}_2_conv"
    position = int(kind == "attentions")
    if side == "down":
        return f"input_blocks_{3 * block + index + 1}_{position}_{inside}"
    return f"output_blocks_{3 * block + index}_{position}_{inside}"
