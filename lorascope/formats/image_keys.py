"""Names of tensors in adapters of image and video models: module and factor for every spelling.

A factor is ``A`` and ``B`` of LoRA (also spelled down and up), ``mid`` of its Tucker form, ``alpha``, ``dora_scale``,
``magnitude``, or a name of LyCORIS such as ``hada_w1_a``. Modules may be flattened, with underscores instead of dots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import unreadable
from lorascope.formats.mlx import SETTINGS
from lorascope.formats.peft_factors import require_factor
from lorascope.formats.pretrained_weights import OptionalBase, base_with_weight
from lorascope.formats.stored_update import StoredTensor, in_order, stored_tensors, uncompiled_name

Tensors = dict[str, StoredTensor]
"""Tensors of one module by factor."""

METADATA = "lora_adapter_metadata"
"""Key of the configuration that diffusers writes to the header."""
_FACTOR = re.compile(
    r"(?s)(?P<module>.+?)(?:"
    r"\.lora_(?P<plain>A|B|down|up|mid)(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
    r"|[._]lora(?P<number>\d?)\.(?P<dotted>down|up)\.weight"
    r"|\.lora_linear_layer\.(?P<layer>down|up)\.weight)"
)
_NAMED_FACTOR = re.compile(
    r"(?s)(?P<module>.+?)(?:[._]lora)?\.(?P<factor>alpha|dora_scale|scalar|lora_magnitude_vector(?:\.weight)?"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks|rescale|weight|on_input"
    r"|(?:[ab][12]|bm)\.weight|diff|w_norm|set_weight)"
)
# Spellings that only adapters of image models have, and prefixes of components before spellings that others share.
_FLAT = re.compile(r"(?:lora_(?:unet|te\d?|prior|transformer)|lycoris|oft_unet)_")
_SPELLED = re.compile(
    r"(?:\.lora_(?:up|down)|[._]lora\d?\.(?:up|down)|\.lora_linear_layer\.(?:up|down))\.weight$"
    r"|\.(?:hada_w1_[ab]|lokr_w1(?:_a)?|oft_blocks|dora_scale|on_input)$"
)
_COMPONENT = re.compile(r"(?:unet|transformer|text_encoder(?:_\d)?|prior)\.")
_BLOCKS = re.compile(
    r"(?:model\.)?diffusion_model\.|text_encoders\."
    r"|(?:\w+\.)?(?:(?:single_)?transformer_blocks|(?:double|single|joint|down|up|input|output)_blocks|mid_block)\."
)
_PEFT = re.compile(r"\.lora_[AB](?:\.[^.]+)?\.weight$")
_NUMBERS = {"alpha", "scalar", "on_input"}  # may be integers
_SPELLINGS = {"down": "A", "up": "B", "lora_magnitude_vector": "magnitude"}
_ATTENTION = {"1": "img_attn", "2": "txt_attn"}


def is_image_adapter(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Return whether an adapter is for an image or video model, from its tensor keys and its configuration.

    Parameters
    ----------
    config : mapping
        Content of ``adapter_config.json``, or the metadata of the file.
    names : collection of str
        Names of the tensors.
    """
    # The configurations of PEFT and MLX decide, because adapters of text models may have the same tensor names.
    if "peft_type" in config or not SETTINGS.isdisjoint(config):
        return False
    return any(map(_is_image_key, names)) or METADATA in config


def is_diffusers(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Return whether an image adapter has tensor keys as in diffusers, so that its alpha is not in a tensor."""
    if not is_image_adapter(config, names) or any(name.endswith((".alpha", ".dora_scale")) for name in names):
        return False
    return METADATA in config or any(_COMPONENT.match(name) and _FACTOR.fullmatch(name) for name in names)


def _is_image_key(name: str) -> bool:
    split = _split_key(name)
    if split is None or name.startswith("base_model.model."):
        return False
    shared = _COMPONENT.match(name) or _BLOCKS.match(name)
    return bool(_FLAT.match(name) or _SPELLED.search(name) or (shared and (_PEFT.search(name) or split[1] == "diff")))


def _split_key(name: str) -> tuple[str, str] | None:
    """Return module and factor of a tensor's name, None if it is not the name of a factor."""
    if match := _FACTOR.fullmatch(name):
        factor = match["plain"] or match["dotted"] or match["layer"]
        return _module(match["module"], match["number"] or ""), _SPELLINGS.get(factor, factor)
    if match := _NAMED_FACTOR.fullmatch(name):
        factor = match["factor"].removesuffix(".weight")
        return _module(match["module"], ""), _SPELLINGS.get(factor, factor)
    return None


def _module(name: str, number: str) -> str:
    """Return the name of a module without the segments that trainers add to it."""
    name = uncompiled_name(name)
    above, _, leaf = name.rpartition(".processor.")
    if above and number:  # XLabs
        return f"{above}.{_ATTENTION.get(number, 'processor')}.{leaf}"
    if above:  # diffusers stored attention by the processor, in which to_out.0 is to_out
        return f"{above}.{'to_out.0' if leaf == 'to_out' else leaf}"
    # Training scripts that save PEFT's state dict leave its prefix after the component.
    return re.sub(r"^((?:[^.]+\.)?)base_model\.model\.", r"\1", name)


def group_tensors(
    files: Iterable[TensorFile], rename: Callable[[str], str], base: OptionalBase
) -> tuple[dict[str, Tensors], tuple[str, ...]]:
    """Group an image adapter's tensors by module, ordered by layer and role, and return the keys of all others.

    Parameters
    ----------
    files : iterable of TensorFile
    rename : callable
        Name of a module in the base.
    base : PretrainedWeights, optional
        Base, whose weight of a module is subtracted from one that replaces it (``set_weight``).

    Raises
    ------
    ValueError
        A factor is not stored as floats, or a module has it twice.
    """
    module_tensors: dict[str, Tensors] = {}
    other_names = []
    for tensor in stored_tensors(files):
        split = _split_key(tensor.name)
        if split is None:
            other_names.append(tensor.name)
            continue
        module, factor = rename(split[0]), split[1]
        tensors = module_tensors.setdefault(module, {})
        if factor in tensors:
            raise unreadable(tensor.file.path, f"{printable(module)} has {factor} twice, in two spellings")
        if factor not in _NUMBERS:
            require_factor(tensor)
        tensors[factor] = tensor
    for module, tensors in list(module_tensors.items()):
        if "weight" in tensors and "on_input" not in tensors:  # weights of the model itself
            other_names.append(tensors.pop("weight").name)
        # A new weight is an update only if the base is given.
        if "set_weight" in tensors and (len(tensors) > 1 or base_with_weight(base, module) is None):
            other_names.append(tensors.pop("set_weight").name)
        if not tensors:
            del module_tensors[module]
    return in_order(module_tensors), tuple(other_names)
